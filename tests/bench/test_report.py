"""bench/report.py on made-up measurements: the numbers in its table, what it refuses, what it draws."""

import json

import pytest
import report
from report_picture import COLOURS

GPU = "NVIDIA H100 80GB HBM3"


def row(name, ms, *, op="align", shape="clip map", dtype="bf16", mode="full", device=GPU, percent=80.0, **more):
    """One benchmark as the fixture `measure` leaves it: 100 MB, a copy of 3000 GB/s."""
    info = {"op": op, "shape": shape, "row": name, "dtype": dtype, "mode": mode, "device": device, "ms": ms}
    info |= {"gb_per_s": 100.0 / ms, "copy_gb_per_s": 3000.0, "percent_of_copy": percent, "counted_bytes": 100_000_000}
    info |= {"peak_bytes": 40_000_000, "torch": "2.13.0", "triton": "3.7.1"} | more
    return {"name": f"test_{op}[{shape}-{name}]", "extra_info": info}


def three(**changes):
    return [row("ours", 2.0, **changes), row("eager", 13.0, **changes), row("compile", 3.0, **changes)]


@pytest.fixture
def write(tmp_path):
    def run(benchmarks, name="a.json", **content):
        file = tmp_path / name
        commit = {"id": "0123456789abcdef", "dirty": False}
        content = {"benchmarks": benchmarks, "datetime": "2026-11-21T10:00:00", "commit_info": commit} | content
        file.write_text(json.dumps(content))
        return file

    return run


def test_numbers_of_a_gpu(write):
    text = report.table(report.read([write([*three(), row("liger TVD", 2.4)])]))
    head, _, line = [line for line in text.splitlines() if line.startswith("|")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert [cell.strip() for cell in head.strip("|").split("|")][1:6] == [
        "ms",
        "GB/s",
        "% of copy",
        "× eager",
        "× compile",
    ]
    assert cells == ["align clip map", "2", "50", "80", "6.5", "1.5", "40 (40)", "liger TVD 1.2"]
    assert text.startswith(
        f"**{GPU}** (bf16 forward + backward), torch 2.13.0, triton 3.7.1, 2026-11-21, commit 0123456789."
    )
    assert "(3000 GB/s)" in text


@pytest.mark.parametrize("cpu", ["AMD EPYC, 2 threads (CPU)", "CPU, 2 threads", "cpu"])
def test_a_cpu_shows_ratios_and_no_time(write, cpu):
    file = write(three(device=cpu, dtype="fp32"))
    text = report.table(report.read([file]))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines[-1] == "| align clip map | 80 | 6.5 | 1.5 |"
    assert "GB/s" not in text
    assert " ms" not in text


def test_one_line_per_shape_and_all(write):
    found = [*three(), *three(mode="graph", percent=91.0), *three(dtype="fp32"), *three(shape="x", dtype="fp16")]
    measured = report.read([write(found)])
    texts = report.table(measured), report.launched(measured)
    (graph,), (called,) = ([line for line in text.splitlines() if line.startswith("| align")] for text in texts)
    assert graph.startswith("| align clip map | 2 | 50 | 91 |")  # bf16 in a graph, the first of both lists
    assert called.startswith("| align x | 2 | 50 | 80 |")
    for text, modes, title in zip(
        texts, ("bf16 as a CUDA graph", "fp16 forward + backward"),
        ("The device's time, each row replayed as a CUDA graph:", "Rows without a graph, with what the host needed"),
        strict=True,
    ):  # fmt: skip
        assert text.startswith(f"**{GPU}** ({modes}), torch 2.13.0, triton 3.7.1, 2026-11-21, commit 0123456789.")
        assert title in text
    every = [line for line in report.table(measured, every=True).splitlines() if line.startswith("| align")]
    assert len(every) == 4
    assert "| align clip map, fp32 full |" in "\n".join(every)
    assert report.launched(measured, every=True) == ""


@pytest.mark.parametrize("mode", ["graph", "full"])
def test_rows_of_one_kind_are_one_table(write, mode):
    measured = report.read([write(three(mode=mode))])
    assert "| align clip map | 2 | 50 | 80 |" in report.table(measured)
    assert ("replayed as a CUDA graph:" in report.table(measured)) == (mode == "graph")
    assert report.launched(measured) == ""


def test_floor_of_the_step_losses(write):
    found = [row("ours", 0.4, op="step_losses", shape="paper"), row("eager", 9.0, op="step_losses", shape="paper")]
    floor = "100 MB, 0.32 ms at the speed of a copy; ours take 1.25 times as long as a copy of as many"
    for more in ([], three(mode="graph")):  # also where the rows themselves are in the second table
        assert floor in report.table(report.read([write([*found, *more])]))


def test_step_and_visit(write, tmp_path):
    step = {
        "step_ms": 120.0,
        "images_per_second": 300.0,
        "ranks": 1,
        "device": GPU,
        "config": {"name": "h100_random", "compile": False},
        "versions": {"torch": "2.11.0", "triton": "3.6.0"},
        "date": "2026-11-20T06:53:17+00:00",
        "commit": "0123456789abcdef-dirty",
    }
    of_its_own = "(2026-11-20, commit 0123456789 with changes)."
    step["shares_percent"] = {"data": 10.0, "teachers": 90.0}
    visit = {"device": GPU, "date": "2026-11-22", "commit": "feed", "sections": {}}
    visit["sections"] = {"benches": {"exit": 0, "result": {"benchmarks": three()}}, "step": {"exit": 0, "result": step}}
    visit["sections"]["tests"] = {"exit": 1}
    file = tmp_path / "visit.json"
    file.write_text(json.dumps(visit))
    text = report.table(report.read([file]))
    assert "| align clip map | 2 | 50 | 80 | 6.5 | 1.5 | 40 (40) |" in text
    assert "2026-11-22, commit feed" in text
    assert "`h100_random`: data 10 %, teachers 90 %; 120.0 ms, 300 images/s" in text
    visit["sections"] = {"step": {"exit": 0, "result": step | {"config": {"name": "h100_random", "compile": True}}}}
    file.write_text(json.dumps(visit))
    text = report.table(report.read([file]))  # a visit that was cut off after the step
    assert f"**{GPU}**" in text
    assert "torch 2.11.0, triton 3.6.0, 2026-11-20, commit 0123456789 with changes" in text
    assert "`h100_random`, compiled: data" in text
    assert text.endswith(f"300 images/s, 1 rank(s) {of_its_own}")
    visit["sections"] = {"step": {"exit": 0, "result": step | {"images": "random"}}}
    file.write_text(json.dumps(visit))
    assert report.table(report.read([file])).endswith(f"images on the device, nothing decoded {of_its_own}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "a.json: is no JSON"),
        ('{"benchmarks": [', "a.json: is no JSON"),
        ('{"benchmarks": []}', "a.json: holds no benchmark"),
        ('{"sections": {"tests": {"exit": 1}}}', "a.json: no pair of rows ours and eager"),
        ('{"other": 1}', "a.json: expected the JSON of pytest-benchmark"),
        ("[1]", "a.json: expected the JSON of pytest-benchmark"),
        ('{"sections": ["tests"]}', "a.json: not of the form that the benchmarks write"),
        ('{"sections": {"tests": null}}', "a.json: not of the form that the benchmarks write"),
        ('{"benchmarks": 5}', "a.json: not of the form that the benchmarks write"),
        ('{"benchmarks": [{"extra_info": null}]}', "a.json: not of the form that the benchmarks write"),
        ('{"step_ms": 1.0}', r"a.json: not of the form that the benchmarks write \(KeyError: 'versions'\)"),
    ],
)
def test_broken_files(tmp_path, content, message):
    file = tmp_path / "a.json"
    file.write_text(content)
    with pytest.raises(report.ReportError, match=message):
        report.read([file])


@pytest.mark.parametrize(
    "changes", [{"ms": "long"}, {"ms": 0}, {"dtype": "fp8"}, {"mode": None}, {"peak_bytes": "many"}, {"row": []}]
)
def test_rows_that_no_table_can_hold(write, changes):
    found = three()
    found[0]["extra_info"] |= changes
    with pytest.raises(report.ReportError, match=r"a\.json: (not of the form|no pair of rows)"):
        report.read([write(found)])


def test_a_commit_with_changes_is_told(write, tmp_path):
    file = write(three(), commit_info={"id": "0123456789abcdef", "dirty": True})
    assert ", commit 0123456789 with changes. ×" in report.table(report.read([file]))
    visit = {"date": "2026-11-22", "commit": "0123456789abcdef-dirty", "sections": {"benches": {}}}
    visit["sections"]["benches"] = {"date": "2026-11-21", "result": {"benchmarks": three()}}
    file.write_text(json.dumps(visit))
    text = report.table(report.read([file]))
    assert ", 2026-11-21, commit 0123456789 with changes. ×" in text  # a stage that an earlier visit has left


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """command(*words) runs report.py in a folder of its own and returns exit code, standard output and error."""
    monkeypatch.setattr(report, "ROOT", tmp_path)
    (tmp_path / "bench/results").mkdir(parents=True)

    def run(*words):
        monkeypatch.setattr("sys.argv", ["report.py", *map(str, words)])
        return report.main(), *capsys.readouterr()

    return run


def test_a_table_per_device(write, command, tmp_path):
    assert command() == (2, "", "error: no JSON given and none in bench/results; measure first: pytest bench/ "
                         "--benchmark-json FILE\n")  # fmt: skip
    cpu = "AMD EPYC, 2 threads (CPU)"
    write(three(), "bench/results/a.json")
    write(three(shape="x"), "bench/results/b.json")
    write(three(device=cpu, dtype="fp32"), "bench/results/c.json")
    write(three(device="Another, 2 threads (CPU)", dtype="fp32"), "bench/results/d.json")
    write(three(), "bench/results/tune-a.json")
    code, out, _ = command()
    assert code == 0
    tables = [line for line in out.splitlines() if line.startswith("**")]
    assert [table.partition("**,")[0].split("**")[1] for table in tables] == [GPU, cpu, "Another, 2 threads (CPU)"]
    assert out.count("| align clip map | 80 | 6.5 | 1.5 |") == 2
    assert not (tmp_path / report.PICTURE).exists()
    for option in (["--write"], ["--picture", tmp_path / "page"]):
        code, out, err = command(*option)
        assert (code, out) == (2, "")
        assert f"--write and --picture are of one device, found {GPU}, {cpu}, Another" in err


def test_write(write, command, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    file = write([*three(mode="graph"), *three(shape="x")])
    measured = report.read([file])
    pages = {tmp_path / report.README: report.table(measured), tmp_path / report.DETAILS: report.launched(measured)}
    (tmp_path / "docs").mkdir()
    for page in pages:
        page.write_text(f"before\n{report.BEGIN}\nold table\n{report.END}\nafter\n")
    for _ in range(2):
        assert command(file, "--write") == (0, "", "")
        for page, text in pages.items():
            assert page.read_text() == f"before\n{report.BEGIN}\n{text}\n{report.END}\nafter\n"
    assert command(file)[1] == "\n\n".join(pages.values()) + "\n"
    for page in pages:
        before = page.read_text()
        page.write_text("no markers")
        code, _, err = command(file, "--write")
        assert (code, page.read_text()) == (2, "no markers")
        assert err.startswith(f"error: {page}: expected the lines {report.BEGIN!r}")
        page.write_text(before)


def test_where_nothing_can_be_written(write, command, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    file = write(three())
    for place in (tmp_path, file / "below.png"):
        code, _, err = command(file, "--picture", place)
        assert code == 2
        assert err.startswith(f"error: --picture {place}: cannot be written (")
    code, _, err = command(file, "--picture", tmp_path / "picture.nothing")
    assert (code, err.startswith("error: --picture ")) == (2, True)
    assert command(file)[0] == 0
    assert (tmp_path / report.PICTURE).is_file()


def test_refused_mixtures(write, tmp_path):
    first = write(three())
    with pytest.raises(report.ReportError, match="one table holds one device, found CPU, 2 threads, NVIDIA H100"):
        report.read([first, write(three(device="CPU, 2 threads", dtype="fp32"), "b.json")])
    cpus = [write(three(device=f"{cpu}, 2 threads (CPU)", shape=cpu), f"{cpu}.json") for cpu in ("AMD", "Apple")]
    with pytest.raises(report.ReportError, match=r"found AMD, 2 threads \(CPU\), Apple, 2 threads \(CPU\)"):
        report.read(cpus)
    with pytest.raises(report.ReportError, match=r"b\.json: align clip map bf16 full is in another"):
        report.read([first, write(three(), "b.json")])
    with pytest.raises(report.ReportError, match="row ours, twice"):
        report.read([write([*three(), row("ours", 1.0)], "b.json")])
    incomplete = three()
    del incomplete[1]["extra_info"]["ms"]
    with pytest.raises(report.ReportError, match=r"b.json: test_align\[clip map-eager\] has no ms"):
        report.read([write(incomplete, "b.json")])
    with pytest.raises(report.ReportError, match="no pair of rows ours and eager"):
        report.read([write([row("ours", 2.0)], "b.json")])
    with pytest.raises(report.ReportError, match=r"none\.json: cannot be read"):
        report.read([tmp_path / "none.json"])


def test_the_picture_is_of_the_device_alone_where_that_was_measured(write, command, tmp_path):
    pictures = []
    for further in ([], three(op="moments")):
        file = tmp_path / f"{len(pictures)}.png"
        assert command(write([*three(mode="graph"), *further]), "--picture", file)[0] == 0
        pictures.append(file.read_bytes())
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize("with_compile", [True, False])
def test_picture(write, command, tmp_path, with_compile):
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="matplotlib is not installed")
    found = [bench for bench in three() if with_compile or bench["extra_info"]["row"] != "compile"]
    file = tmp_path / "images" / "roofline.png"
    assert command(write(found), "--picture", file)[0] == 0
    pixels = (pyplot.imread(file)[..., :3] * 255).round().astype(int).reshape(-1, 3)
    for name, colour in COLOURS.items():
        wanted = [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
        drawn = int((abs(pixels - wanted).max(1) <= 2).sum())
        # A point, its colour in the legends and, but for ours, a bar; not measured: the dot in the left legend alone.
        assert drawn > (100 if with_compile or name != "compile" else 0), name
        if name == "compile" and not with_compile:
            assert drawn < 300
