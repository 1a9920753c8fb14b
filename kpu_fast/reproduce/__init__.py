"""The paper's ablation at a size anyone can rerun: trains students from the zoo, evaluates them, writes the table."""
