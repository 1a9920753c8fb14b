"""The config tree: what is shipped is valid, and a mistake is answered with the key, what was found, what would do."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kpu_fast.config import Config, ConfigError, load_config

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "configs").glob("*.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_configs_are_valid(path):
    assert load_config(path).name == path.stem


def test_configs_that_are_named_exist():
    pages = [
        ROOT / "README.md",
        ROOT / "Dockerfile",
        ROOT / "Makefile",
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("examples/*"),
    ]
    named = {name for page in pages if page.is_file() for name in re.findall(r"configs/\w+\.json", page.read_text())}
    assert {"configs/h100.json", "configs/random.json", "configs/zoo.json"} <= named
    assert not [name for name in named if not (ROOT / name).is_file()]


def test_ablation_is_four_configs():
    a, b, c, kpu = (
        load_config(ROOT / "configs" / f"{n}.json") for n in ("base_a", "base_b", "base_c", "h100_deformable")
    )
    assert a.student.adapter is None
    assert not a.student.freeze_vit
    assert all(cfg.student.adapter.cross_attention == "deformable" and cfg.student.freeze_vit for cfg in (b, c, kpu))
    assert [(cfg.objective.t2s, cfg.objective.rec) for cfg in (a, b, c, kpu)] == [(False,) * 2] * 2 + [
        (True, False),
        (True, True),
    ]
    assert {cfg.steps for cfg in (a, b, c, kpu)} == {40000}


def test_ablation_of_balance_standardisation_and_teachers():
    famo, drop, phi_s, clip, gdino, kpu = (
        load_config(ROOT / "configs" / f"{n}.json")
        for n in ("kpu_famo", "kpu_teacher_drop", "kpu_phi_s", "clip_only", "gdino_only", "h100_deformable")
    )
    assert [cfg.objective.balance for cfg in (kpu, famo, drop, phi_s)] == ["equal", "famo", "teacher_drop", "equal"]
    assert [cfg.objective.standardize for cfg in (kpu, famo, drop, phi_s)] == ["none", "none", "none", "phi_s"]
    assert (list(clip.teachers), list(gdino.teachers)) == (["clip"], ["gdino"])
    for cfg in (famo, drop, phi_s, clip, gdino):
        assert (cfg.student, cfg.optimizer, cfg.steps) == (kpu.student, kpu.optimizer, kpu.steps)


def test_overrides_reach_nested_keys_and_wildcards():
    cfg = load_config(
        ROOT / "configs" / "random.json",
        [
            "optimizer.lr=1e-4",
            "teachers.*.data.batch_size=3",
            "name=other",
            "source=/data",
            "deepspeed.zero_optimization.stage=2",
        ],
    )
    assert (cfg.optimizer.lr, cfg.name) == (1e-4, "other")
    assert [(t.data.batch_size, t.data.source) for t in cfg.teachers.values()] == [(3, "/data")] * 3
    assert cfg.deepspeed_config()["zero_optimization"] == {"stage": 2}
    assert cfg.deepspeed_config()["train_micro_batch_size_per_gpu"] == 9


def test_what_a_wildcard_gave_to_all_can_be_changed_for_one():
    overrides = ['teachers.*.data={"batch_size": 4, "size": [128, 128]}', "teachers.gdino.data.batch_size=2"]
    cfg = load_config(ROOT / "configs" / "random.json", overrides)
    assert {key: t.data.batch_size for key, t in cfg.teachers.items()} == {"clip": 4, "gdino": 2, "dinov2": 4}


def test_brackets_without_end_are_a_mistake_like_others():
    for depth in (330, 500, 900):
        with pytest.raises(ConfigError, match=r"random\.json: "):
            load_config(ROOT / "configs" / "random.json", [f"source={'[' * depth}{']' * depth}"])


def test_a_teacher_may_have_the_name_of_a_type():
    with pytest.raises(ConfigError, match=r"teachers\.str\.weights: missing"):
        load_config(ROOT / "configs" / "random.json", ['teachers.str={"kind": "clip"}'])
    with pytest.raises(ConfigError, match=r" source: found 7"):
        load_config(ROOT / "configs" / "random.json", ["source=7"])


def test_a_teacher_on_anothers_images_has_its_data():
    shared = ["teachers.dinov2.data=null", "teachers.dinov2.images_of=clip"]
    cfg = load_config(ROOT / "configs" / "random.json", [*shared, "teachers.*.data.batch_size=6"])
    assert cfg.teachers["dinov2"].data == cfg.teachers["clip"].data
    assert cfg.streams() == {"clip": ["clip", "dinov2"], "gdino": ["gdino"]}
    assert (cfg.images_per_backward(), cfg.deepspeed_config()["train_micro_batch_size_per_gpu"]) == (12, 12)
    assert load_config(ROOT / "configs" / "random.json").streams() == {n: [n] for n in ("clip", "gdino", "dinov2")}
    same = load_config(ROOT / "configs" / "random.json", ["teachers.dinov2.images_of=clip"])  # its data is clip's own
    assert same.teachers["dinov2"].data == same.teachers["clip"].data


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teachers.dinov2.images_of=clap"], 'found "clap"; expected a teacher with images of its own: "clip" or "gdi'),
        (["teachers.dinov2.images_of=dinov2"], 'found "dinov2"; expected a teacher with images of its own: "clip" or'),
        (["teachers.dinov2.images_of=clip", "teachers.clip=null"], 'found "clip"; expected .* of its own: "gdino"$'),
        (
            ["teachers.dinov2.images_of=clip", "teachers.clip.images_of=gdino", "teachers.clip.data=null"],
            'teachers.dinov2.images_of: found "clip"; expected a teacher with images of its own: "gdino"$',
        ),
        (["teachers.dinov2.images_of=7"], "teachers.dinov2.images_of: found 7; expected a teacher with images of its"),
        (['teachers.dinov2.images_of={"a": 1}'], 'dinov2.images_of: found {"a": 1}; expected a teacher with images of'),
        (
            ["teachers.dinov2.images_of=clip", "teachers.dinov2.data=hello"],
            'dinov2.data: found "hello" with teachers.d',
        ),
        (
            ["teachers.dinov2.images_of=clip", "teachers.dinov2.data.flop=1"],
            "dinov2.data.flop: found 1, but teachers.d",
        ),
        (["teachers.dinov2.images_of=gdino"], r'dinov2.data.batch_size: found 8, but teachers.dinov2.images_of is "gd'),
        (
            ["teachers.dinov2.images_of=clip", "teachers.dinov2.data.source=/elsewhere"],
            'teachers.dinov2.data.source: found "/elsewhere", but .*; leave data out, or set it to null$',
        ),
        (["teachers.dinov2.images_of=clip", "teachers.clip.data=null", "teachers.dinov2.data=null"], "clip.data"),
    ],
)
def test_images_of_what_has_none_and_other_data_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(ROOT / "configs" / "random.json", overrides)
    assert str(caught.value).startswith(f"{ROOT / 'configs' / 'random.json'}: ")


def test_what_is_wrong_with_shared_data_is_said_once():
    shared = ["teachers.dinov2.data=null", "teachers.dinov2.images_of=clip"]
    with pytest.raises(ConfigError) as caught:
        load_config(ROOT / "configs" / "random.json", [*shared, "teachers.clip.data.size=[100,128]"])
    (line,) = str(caught.value).splitlines()
    assert "teachers.clip.data.size.0: found 100" in line


def test_a_config_made_in_python_is_held_to_the_same():
    cfg = load_config(ROOT / "configs" / "random.json", ["teachers.dinov2.images_of=clip"]).model_dump()
    assert Config(**cfg).streams()["clip"] == ["clip", "dinov2"]
    for other, size in (("gdino", None), ("nobody", None), ("dinov2", None), ("clip", (64, 64))):
        teachers = {name: dict(teacher) for name, teacher in cfg["teachers"].items()}
        teachers["dinov2"]["images_of"] = other
        if size is not None:
            teachers["dinov2"]["data"] = teachers["dinov2"]["data"] | {"size": size}
        with pytest.raises(
            ValueError, match=r"teachers.dinov2.images_of: found .*; expected another teacher with images"
        ):
            Config(**(cfg | {"teachers": teachers}))


def test_a_wildcard_passes_over_what_is_left_out():
    for name, left in (("clip_only", "clip"), ("gdino_only", "gdino")):
        cfg = load_config(ROOT / "configs" / f"{name}.json", ["teachers.*.data.batch_size=8"])
        assert {key: teacher.data.batch_size for key, teacher in cfg.teachers.items()} == {left: 8}
    cfg = load_config(ROOT / "configs" / "random.json", ["teachers.clip=null", "teachers.*.data.threads=1"])
    assert {key: teacher.data.threads for key, teacher in cfg.teachers.items()} == {"gdino": 1, "dinov2": 1}
    with pytest.raises(ConfigError, match=r"teachers\.clip: found 7") as caught:
        load_config(ROOT / "configs" / "clip_only.json", ["teachers.*=7"])
    assert "gdino" not in str(caught.value)


def test_a_teacher_set_to_null_is_left_out():
    cfg = load_config(ROOT / "configs" / "random.json", ["teachers.dinov2=null", "teachers.gdino=null"])
    assert list(cfg.teachers) == ["clip"]
    with pytest.raises(ConfigError, match="teachers: found"):
        load_config(ROOT / "configs" / "random.json", ["teachers.*=null"])


@pytest.mark.parametrize("balance", ["famo", "teacher_drop"])
def test_balance_needs_two_teachers(balance):
    random, balanced = ROOT / "configs" / "random.json", f"objective.balance={balance}"
    assert load_config(random, [balanced, "teachers.dinov2=null"]).objective.balance == balance
    with pytest.raises(ConfigError, match=f'objective.balance: found "{balance}" with one teacher'):
        load_config(random, [balanced, "teachers.dinov2=null", "teachers.gdino=null"])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_a_resolved_config_is_a_config(path):
    """config.resolved.json names every default, also of keys that only go with others."""
    cfg = load_config(path)
    assert Config.model_validate_json(cfg.model_dump_json()) == cfg


def test_deepspeed_block_goes_through_untouched():
    block = {
        "zero_optimization": {"stage": 3, "overlap_comm": False},
        "memory_breakdown": True,
        "steps_per_print": 7,
        "seq_parallel_communication_data_type": "fp32",  # no slip of the pen for communication_data_type
        "key_of_a_later_deepspeed": {},
    }
    cfg = load_config(ROOT / "configs" / "random.json", [f"deepspeed={json.dumps(block)}"])
    assert block.items() <= cfg.deepspeed_config().items()


MISTAKES = [
    ("stepz=3", "stepz: unknown key; did you mean 'steps'?"),
    ("teachers.clip.data.batchsize=3", "teachers.clip.data.batchsize: unknown key; did you mean 'batch_size'?"),
    ("objective.zzz=3", "objective.zzz: unknown key; known here: recipe, t2s, rec"),
    ('objective={"recipe": "gkd", "zzz": 3}', "objective.zzz: unknown key; known here: recipe, query, token_weight"),
    ("objective.recipe=kup", "objective.recipe: found \"kup\" (a string); it should be 'kpu' or 'gkd'"),
    ("objective.recipe=[1]", "objective.recipe: found [1] (a list); it should be 'kpu' or 'gkd'"),
    ('objective={"recipe": "gkd", "token_weight": "a"}', 'objective.token_weight: found "a" (a string); it should be'),
    ("objective.t2s=1", "objective.t2s: found 1 (an integer); it should be a valid boolean"),
    ("objective=null", "objective: found null (null); it should be an object"),
    ('steps="100"', 'steps: found "100" (a string); it should be a valid integer'),
    ("steps=true", "steps: found true (a boolean)"),
    ("steps=0", "steps: found 0 (an integer); it should be greater than or equal to 1"),
    ("optimizer.lr=1e999", "optimizer.lr: found Infinity (a number)"),
    ("optimizer.lr=NaN", "optimizer.lr: found NaN (a number)"),
    ("precision=fp16", "precision: found \"fp16\" (a string); it should be 'bf16' or 'fp32'"),
    ("name=../evil", 'name: found "../evil" (a string)'),
    ("teachers={}", "teachers: found {} (an object)"),
    ("teachers.clip=3", "teachers.clip: found 3 (an integer)"),
    ("optimizer.betas=[1,1]", "optimizer.betas.0: found 1 (an integer); it should be less than 1"),
    ("optimizer.min_lr=1", "optimizer.min_lr: found 1.0, more than lr = 0.001"),
    ("seed=1e30", "seed: found 1e+30 (a number)"),
    ("deepspeed.zero_optimization.stage=true", "deepspeed.zero_optimization: found {'stage': True}"),
    (
        "teachers.clip.data.size=[100,128]",
        "teachers.clip.data.size.0: found 100 (an integer); it should be a multiple of 32",
    ),
    (
        "teachers.clip.data.source=7",
        "teachers.clip.data.source: found 7 (an integer); it should be a valid string or a valid array",
    ),
    (
        "teachers.clip.data.size=224",
        "teachers.clip.data.size: found 224 (an integer); it should be a list of two numbers",
    ),
    (
        "teachers.clip.data.size=[224]",
        "teachers.clip.data.size: found [224] (a list); it should be a list of two numbers",
    ),
    ("optimizer.betas=[0.9,0.9,0.9]", "optimizer.betas: found [0.9, 0.9, 0.9] (a list); it should be a list of two"),
    ("teachers.clip.data.crop_scale=[0.9,0.1]", "teachers.clip.data.crop_scale: found [0.9, 0.1]"),
    ("teachers.clip.data.aspect_ratio_grouping=false", 'clip.data.aspect_ratio_grouping: belongs to fit "pad"; found'),
    ("teachers.clip.data.buckets=[[64,64]]", 'teachers.clip.data.buckets: belongs to fit "pad"; found "crop"'),
    (
        "teachers.gdino.data.buckets=[[64,288]]",
        "gdino.data.buckets: [64, 288] is not smaller than size [192, 256]: one",
    ),
    (
        "teachers.gdino.data.buckets=[[192,256]]",
        "teachers.gdino.data.buckets: [192, 256] is not smaller than size [192, 256]",
    ),
    (
        "teachers.gdino.data.buckets=[[160,224]]",
        "gdino.data.buckets: [160, 224] suits no image, each is larger on [192, 256]; make one side as long",
    ),
    ("teachers.gdino.data.buckets=[[192,160]]", "[192, 160] suits no image, each is larger on [256, 192]; make"),
    ("teachers.gdino.data.buckets=[[64,50]]", "teachers.gdino.data.buckets.0.1: found 50"),
    ("teachers.gdino.data.buckets=[64,64]", "teachers.gdino.data.buckets.0: found 64"),
    ("teachers.gdino.data.crop_scale=[0.5,1]", 'teachers.gdino.data.crop_scale: belongs to fit "crop"; found "pad"'),
    ("teachers.clip.levels=[1]", 'teachers.clip.levels: found [1] with kind "clip"'),
    ("teachers.clip.levels=[]", "teachers.clip.levels: found [] (a list); list should have at least 1 item"),
    ("teachers.clip.weights=openai/clip", 'teachers.clip.arch: found with weights "openai/clip"'),
    ("teachers.clip.kind=backbone", 'teachers.clip.levels: found None with kind "backbone"'),
    ("student.adapter=null", "student.freeze_vit: true without an adapter"),
    ("student.adapter.points=3", 'student.adapter.points: belongs to cross_attention "deformable"'),
    ("objective.t2s=false", "objective.rec: reconstruction starts from the common space"),
    ("output=", 'output: found "" (a string); string should have at least 1 character'),
    ("objective.balance=fame", "objective.balance: found \"fame\" (a string); it should be 'equal', 'famo' or"),
    ("objective.standardize=phi-s", "objective.standardize: found \"phi-s\" (a string); it should be 'none'"),
    ("objective.standardize_batches=0", "objective.standardize_batches: found 0 (an integer); it should be greater"),
    ("objective.standardize_batches=9", 'objective.standardize_batches: belongs to standardize "meanstd" or "phi_s"'),
    ("checkpoint.keep_every=60", "checkpoint.keep_every: found 60; expected a multiple of every = 40"),
    ("checkpoint.keep_every=0", "checkpoint.keep_every: found 0 (an integer); it should be greater than or equal to 1"),
    ("optimizer.warmup_steps=121", "optimizer.warmup_steps: found 121, more than steps = 120"),
    ("deepspeed.zero_optimization.stage=4", "deepspeed.zero_optimization: found"),
    ("deepspeed.zero_optimization.compute_grad_norm=false", "not true, but clipping needs the norm"),
    ("deepspeed.zero_optimization.compute_grad_norm=0", "not true, but clipping needs the norm"),
    ("deepspeed.bf16.immediate_grad_update=0", "found 0; unless it is true, DeepSpeed's"),
    ("deepspeed.optimizer.type=Adam", "deepspeed.optimizer: set it through optimizer"),
    ("deepspeed.train_micro_batch_size_per_gpu=3", "deepspeed.train_micro_batch_size_per_gpu: found 3"),
    ("deepspeed.train_batch_size=18", "deepspeed.train_batch_size: found 18; it depends on the number of ranks"),
    ("deepspeed.torch_autocast.enabled=true", "deepspeed.torch_autocast: not supported; set precision"),
    ("deepspeed.amp.enabled=true", "deepspeed.amp: not supported; set precision"),
    ("deepspeed.bf16.enabled=true", "deepspeed.bf16: found {'enabled': True}, which contradicts"),
    ("deepspeed.fp16.enabled=true", "deepspeed.fp16: not supported"),
    ("deepspeed.bfloat16.enabled=false", "deepspeed.bfloat16: set it through precision"),
    ("deepspeed.zero_optimizaton.stage=2", "zero_optimizaton: unknown key; did you mean 'zero_optimization'?"),
    ("deepspeed.train_batchsize=8", "deepspeed.train_batchsize: unknown key; did you mean 'train_batch_size'?"),
    ("deepspeed.bf16=true", "deepspeed.bf16: found True; expected an object"),
    ("deepspeed.gradient_accumulation_steps=2", "deepspeed.gradient_accumulation_steps: found 2, but gradient_acc"),
    ("output=runs[1]", "output: found 'runs[1]'; DeepSpeed takes [ in a checkpoint's path for a pattern"),
    ("gradient_accumulation_steps=0", "gradient_accumulation_steps: found 0"),
    ("deepspeed.gradient_clipping=5", "deepspeed.gradient_clipping: found 5"),
    ("optimizer", "--set optimizer: expected path.to.key=value"),
    ("name.deeper=1", "--set name.deeper=1: name is not an object"),
    ("teachers..x=1", "--set teachers..x=1: expected path.to.key=value"),
]


@pytest.mark.parametrize(("override", "message"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_mistakes_are_named(override, message):
    with pytest.raises(ConfigError) as caught:
        load_config(ROOT / "configs" / "random.json", [override])
    assert message in str(caught.value)


def test_famo_needs_the_whole_batch_of_its_step():
    random = ROOT / "configs" / "random.json"
    load_config(random, ["gradient_accumulation_steps=2", "objective.balance=teacher_drop"])
    with pytest.raises(ConfigError, match=r'gradient_accumulation_steps: found 2; objective\.balance "famo" compares'):
        load_config(random, ["gradient_accumulation_steps=2", "objective.balance=famo"])


def test_an_objective_without_any_loss_is_refused():
    weights = [f"objective.{name}=0" for name in ("x_weight", "cos_weight", "l1_weight")]
    for left_out in weights:
        others = [weight for weight in weights if weight != left_out]
        load_config(ROOT / "configs" / "random.json", [*others, "teachers.gdino=null"])
    with pytest.raises(ConfigError, match=r"objective\.x_weight: found 0 for x_weight, cos_weight and l1_weight"):
        load_config(ROOT / "configs" / "random.json", weights)


def test_an_objective_of_x_alone_needs_teachers_with_an_x():
    x_alone, random = ["objective.cos_weight=0", "objective.l1_weight=0"], ROOT / "configs" / "random.json"
    load_config(random, [*x_alone, "teachers.gdino=null"])
    load_config(random, [x_alone[0]])
    load_config(random, [x_alone[1]])
    message = r"objective\.cos_weight: found 0 for cos_weight and l1_weight, but teacher "
    with pytest.raises(ConfigError, match=message + r'"gdino" has no x \(kind "grounding_dino"\)'):
        load_config(random, x_alone)
    for kind in ("siglip", "dinov3", "dinov2"):
        load_config(random, ["teachers.gdino=null", f"teachers.dinov2.kind={kind}", *x_alone])
    with pytest.raises(ConfigError, match=message + r'"dinov2" has no x \(kind "sam"\)'):
        load_config(random, ["teachers.gdino=null", "teachers.dinov2.kind=sam", *x_alone])
    swin = ["teachers.gdino=null", "teachers.dinov2.kind=backbone", "teachers.dinov2.levels=[1]"]
    with pytest.raises(ConfigError, match=message + r'"dinov2" has no x \(kind "backbone"\)'):
        load_config(random, [*swin, "teachers.dinov2.arch.model_type=swin", *x_alone])


def test_deepspeeds_switches_that_do_not_go_with_several_forwards():
    random, one = ROOT / "configs" / "random.json", ["teachers.gdino=null", "teachers.dinov2=null"]
    for switch in ("wall_clock_breakdown=true", 'flops_profiler={"enabled": true}'):
        name = switch.partition("=")[0]
        with pytest.raises(ConfigError, match=rf"deepspeed\.{name}: found it on.* here are [23]; leave it out"):
            load_config(random, [f"deepspeed.{switch}"])
        load_config(random, [f"deepspeed.{switch}", *one])
    load_config(random, ['deepspeed.flops_profiler={"enabled": false}', "deepspeed.wall_clock_breakdown=false"])
    with pytest.raises(ConfigError, match=r"deepspeed\.zero_optimization\.round_robin_gradients: not supported"):
        load_config(random, ['deepspeed.zero_optimization={"stage": 2, "round_robin_gradients": true}'])


def test_a_number_is_a_name():
    random = ROOT / "configs" / "random.json"
    assert load_config(random, ["name=20241129"]).name == "20241129"
    with pytest.raises(ConfigError, match="name: found true"):
        load_config(random, ["name=true"])


def test_what_a_run_recorded_is_a_config(tmp_path):
    cfg = load_config(ROOT / "configs" / "random.json", ["steps=70"])
    path = tmp_path / "config.resolved.json"
    record = {"config": cfg.model_dump(mode="json"), "commit": None, "versions": {}, "python": "3", "machine": "m"}
    path.write_text(json.dumps(record))
    assert load_config(path) == cfg
    del record["config"]["objective"]["centre"]  # of a version that did not centre yet
    path.write_text(json.dumps(record))
    assert not load_config(path).objective.centre
    for damaged in ([1], None, {"objective": {}}):
        (tmp_path / "damaged.json").write_text(json.dumps(record | {"config": damaged}))
        with pytest.raises(ConfigError, match=r"damaged\.json: .* a run records, but its config is damaged"):
            load_config(tmp_path / "damaged.json")
    record["config"] = cfg.model_dump(mode="json")
    path.write_text(json.dumps(record))
    (tmp_path / "mine.json").write_text(json.dumps({"extends": path.name, "steps": 80}))
    assert load_config(tmp_path / "mine.json") == cfg.model_copy(update={"steps": 80})


def test_the_weight_of_a_reconstruction_that_is_off_is_refused():
    load_config(ROOT / "configs" / "random.json", ["objective.rec_weight=0.5"])
    with pytest.raises(ConfigError, match=r"objective\.rec_weight: belongs to rec true; found false"):
        load_config(ROOT / "configs" / "random.json", ["objective.rec_weight=0.5", "objective.rec=false"])


def test_precision_may_be_repeated_to_deepspeed():
    off = ["deepspeed.torch_autocast.enabled=false", "deepspeed.amp.enabled=false", "deepspeed.fp16.enabled=false"]
    assert load_config(ROOT / "configs" / "random.json", off).precision == "fp32"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected an object"),
        ('{"name": "a", "name": "b"}', "appears twice"),
        ('{"extends": "missing.json"}', "cannot be read"),
        ('{"extends": "self.json"}', "in a circle"),
        ('{"extends": 3}', "extends: found 3"),
        ("{}", "steps: missing"),
        ("\x00\xff", "not valid JSON"),
    ],
)
def test_files_that_are_no_config(tmp_path, text, message):
    (tmp_path / "self.json").write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "self.json")


def test_extends_merges_objects_and_replaces_the_rest(tmp_path):
    base = str(ROOT / "configs" / "random.json")
    child = {"extends": base, "name": "child", "optimizer": {"lr": 0.5}, "source": ["x"]}
    (tmp_path / "child.json").write_text(json.dumps(child))
    cfg, base = load_config(tmp_path / "child.json"), load_config(base)
    assert (cfg.name, cfg.optimizer.lr, cfg.optimizer.warmup_steps) == ("child", 0.5, base.optimizer.warmup_steps)
    assert cfg.teachers["clip"].data.source == ["x"]


def test_command_answers_in_one_line_before_any_model_library_loads(tmp_path):
    script = (
        "import os, sys, runpy\n"
        "os._exit = sys.exit  # a process that is gone tells nothing of what it had loaded\n"
        f"sys.argv = ['train.py', '--config', {str(ROOT / 'configs' / 'random.json')!r}, '--set', 'stepz=3']\n"
        f"sys.path.insert(0, {str(ROOT / 'kpu_fast')!r})\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / 'kpu_fast' / 'train.py')!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    heavy = {'torch', 'deepspeed', 'transformers', 'nvidia.dali'} & set(sys.modules)\n"
        "    print('code', end.code, 'heavy', sorted(heavy))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "code 2 heavy []"
    assert done.stderr.count("\n") == 1
    assert "stepz: unknown key; did you mean 'steps'?" in done.stderr


def test_half_a_character_is_named(tmp_path):
    path = tmp_path / "half.json"
    path.write_text('{"extends": "' + str(ROOT / "configs" / "random.json") + '", "name": "\\ud800"}')
    with pytest.raises(ConfigError, match=r"half.json: '\\ud800' is no character of any text"):
        load_config(path)


@pytest.mark.parametrize("balance", ["famo", "teacher_drop"])
def test_a_teachers_weight_and_a_balance_contradict(balance):
    random = ROOT / "configs" / "random.json"
    assert load_config(random, ["teachers.clip.weight=2"]).teachers["clip"].weight == 2.0
    with pytest.raises(
        ConfigError, match=f'teachers.clip.weight: belongs to objective.balance "equal"; found "{balance}"'
    ):
        load_config(random, ["teachers.clip.weight=2", f"objective.balance={balance}"])
    with pytest.raises(ConfigError, match=r"teachers\.clip\.weight: found 0"):
        load_config(random, ["teachers.clip.weight=0"])


GKD = [
    'objective={"recipe": "gkd"}', "student.adapter=null", "student.freeze_vit=false", "student.head_hidden=1280",
    "teachers.*.data.fit=crop", "teachers.*.data.aspect_ratio_grouping=true", "teachers.*.data.buckets=[]",
]  # fmt: skip


def test_a_gkd_config():
    cfg = load_config(ROOT / "configs" / "random.json", GKD)
    assert (cfg.objective.recipe, cfg.objective.query, cfg.objective.balance) == ("gkd", True, "equal")
    assert cfg.objective.masked(5, 36) == (2, 18)
    for name in ("gkd", "h100_gkd"):
        assert load_config(ROOT / "configs" / f"{name}.json").objective == cfg.objective


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["student.adapter={}"], 'student.adapter: objective.recipe "gkd" trains a bare ViT'),
        (["student.head_hidden=64"], "student.head_hidden: found with objective.recipe"),
        (["teachers.gdino.data.fit=pad"], "teachers.gdino.data.fit: objective.recipe"),
        (
            ["objective.feature_weight=0", "objective.patch_weight=0"],
            "objective.feature_weight: found 0 for feature_wei",
        ),
        (["teachers.gdino.data.batch_size=1"], "objective.mask_images: 0.5 of teachers.gdino.data.batch_size 1 is not"),
        (["objective.mask_images=0.01"], "objective.mask_images: 0.01 of teachers.clip.data.batch_size"),
        (["objective.mask_patches=0.001"], "objective.mask_patches: 0.001 of the "),
        (["objective.mask_patches=1.0"], "objective.mask_patches: found 1.0 (a number); it should be less than 1"),
        (["objective.mask_images=1.5"], "objective.mask_images: found 1.5 (a number); it should be less than or equal"),
        (["objective.mask_images=0"], "objective.mask_images: found 0 (an integer); it should be greater than 0"),
        (
            ["objective.balance=famo"],
            "objective.balance: found \"famo\" (a string); it should be 'equal' or 'teacher_d",
        ),
        (["objective.patch_weight=0", "objective.mask_images=0.7"], "objective.mask_images: belongs to patch_weight"),
        (["objective.patch_weight=0", "objective.mask_patches=0.7"], "objective.mask_patches: belongs to patch_weight"),
        (
            ["objective.patch_weight=0", "objective.feature_weight=0", "objective.token_weight=0"],
            "objective.token_weight: found 0 for all three weights",
        ),
        (["objective.token_weight=-1"], "objective.token_weight: found -1 (an integer); it should be greater"),
    ],
)
def test_what_gkd_cannot_be_is_named(overrides, message):
    with pytest.raises(ConfigError) as caught:
        load_config(ROOT / "configs" / "random.json", GKD + overrides)
    assert message in str(caught.value)


def test_masks_that_are_off_need_no_batch():
    one = ["teachers.*.data.batch_size=1", "objective.patch_weight=0"]
    assert load_config(ROOT / "configs" / "random.json", GKD + one).objective.patch_weight == 0
