"""What is compared with what: the runs, the rows and the columns."""

# name → what it changes in the training configuration (`--set`). Base_a, b, c and KPU are the paper's ablation.
RUNS: dict[str, tuple[str, ...]] = {
    "base_a": (
        "student.adapter=null",
        "optimizer.lr=1.5e-3",  # a trained ViT starts from its weights: after 150 steps better off than with 5e-3
        "student.freeze_vit=false",
        "objective.t2s=false",
        "objective.rec=false",
    ),
    "base_b": ("objective.t2s=false", "objective.rec=false"),
    "base_c": ("objective.rec=false",),
    "kpu": (),
    "kpu_famo": ("objective.balance=famo",),
    "kpu_teacher_drop": ("objective.balance=teacher_drop",),
    "kpu_phi_s": ("objective.standardize=phi_s",),
    "clip_only": ("teachers.gdino=null",),
    "gdino_only": ("teachers.clip=null",),
}
LABELS = {
    "base_a": "Base_a: whole ViT trained, s2t",
    "base_b": "Base_b: frozen ViT + adapter, s2t",
    "base_c": "Base_c: + t2s",
    "kpu": "KPU: + rec",
    "kpu_famo": "KPU, FAMO",
    "kpu_teacher_drop": "KPU, TeacherDrop",
    "kpu_phi_s": "KPU, PHI-S",
    "clip_only": "CLIP only",
    "gdino_only": "GroundingDINO only",
}
REFERENCES = {"clip": "teacher: CLIP", "gdino": "teacher: GroundingDINO", "dinov2": "sentinel, untouched"}
COLUMNS = {"zero_shot": "zero-shot top-1", "knn": "kNN top-1", "linear": "linear top-1", "ap": "AP"}
GAPS = {"own": "own spaces", "common": "common space"}
CANVAS = 192  # of the mosaics GroundingDINO learns and is tested on
MOSAICS_TEST, MOSAICS_SEED = 300, 10**6  # that no training mosaic has
GAP_BATCHES = 10
