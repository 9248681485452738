"""Device files: read, written, fitted to measurements, and refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from parallel_core.config.__main__ import main
from parallel_core.errors import ConfigError
from parallel_core.planner.calibrate import ATTENTION, PRODUCTS, device_of, fit_link
from parallel_core.planner.device import COLLECTIVES, Device, Span, device_text, load_device, read_device

A100 = str(Path(__file__).parent / "a100.yaml")


@pytest.mark.parametrize("name", ["ascend910b", "cpu", A100])
def test_a_device_survives_its_file(name: str, tmp_path: Path) -> None:
    device = load_device(name)
    (tmp_path / "same.yaml").write_text(device_text(device))
    assert load_device(str(tmp_path / "same.yaml")) == device


def edited(tmp_path: Path, *changes: tuple[str, str]) -> str:
    text = Path(A100).read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    (tmp_path / "mine.yaml").write_text(text)
    return str(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("memory_gb: 80", "memory_bg: 80", r"mine.yaml:4: memory_bg is no field of a device; did you mean memory_gb\?"),
        ("memory_gb: 80", "memory_bg: 80", "lacks memory_gb"),
        ("memory_gb: 80", "memory_gb: lots", "memory_gb='lots': use a number above zero"),
        ("memory_gb: 80", "memory_gb: .inf", "memory_gb=inf: use a number above zero"),
        ("ranks_per_node: 8", "ranks_per_node: 7.5", "ranks_per_node=7.5: use a whole number above zero"),
        ("overlap: true", "overlap: 1", "overlap=1: use true or false"),
        ('computes_in: ""', "computes_in: int8", "computes_in='int8': use one of float32"),
        ("step_us: 20000", "step_us: -1", "step_us=-1: use a number of 0 or more"),
        ("[96, 192, 192]", "[96, 192]", r"product_half=\[96, 192\]: use three numbers of 0 or more"),
        ("float32: 18", "float32: 0", "product_tflops.float32=0: use a number above zero"),
        ("float32: 18, ", "", "product_tflops: needs float32, float16, bfloat16"),
        ("all_reduce: [10, 230]", "all_reduce: 230", "inside.all_reduce=230: use .microseconds, gigabytes a second"),
        ("all_reduce: [10, 230]", "all_reduce: {a: 1}", "inside.all_reduce.a is too deep"),
    ],
)
def test_a_wrong_file_is_told_what_is_wrong(old: str, new: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        read_device(edited(tmp_path, (old, new)))


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_device(edited(tmp_path, ("overlap: true", "overlap: 1"), ("step_us: 20000", "stepus: 1")))
    assert all(word in str(caught.value) for word in ("overlap=1", "stepus is no field", "lacks step_us"))


def test_transfers_by_hand() -> None:
    """Inside a node by its links; between nodes a ring has the links of its ranks on a node, a message has one."""
    device = read_device(A100)
    gigabyte = 1e9
    inside = device.collective_seconds("all_reduce", gigabyte, Span(8))
    assert inside == pytest.approx(3 * 10e-6 + 2 * 7 / 8 / 230)
    assert device.collective_seconds("all_gather", gigabyte, Span(4, 8)) == pytest.approx(2 * 20e-6 + 3 / 4 / 23)
    assert device.collective_seconds("all_gather", gigabyte, Span(4, 4)) == pytest.approx(2 * 20e-6 + 3 / 4 / 46)
    assert device.collective_seconds("all_gather", gigabyte, Span(16)) == pytest.approx(4 * 20e-6 + 15 / 16 / 184)
    assert device.collective_seconds("all_to_all", gigabyte, Span(16)) == pytest.approx(4 * 20e-6 + 15 / 16 / 23)
    assert device.collective_seconds("point_to_point", gigabyte, Span(2, 64)) == pytest.approx(20e-6 + 1 / 23)
    assert device.collective_seconds("all_reduce", gigabyte, Span(1)) == 0.0


def test_products_are_slower_where_they_are_small() -> None:
    device = replace(read_device(A100), memory_gb_per_s=1e9)
    rate = [2.0 * n**3 / device.product_seconds(n, n, n, "float16") for n in (64, 512, 8192)]
    assert rate[0] < rate[1] < rate[2] < 280e12
    moved = replace(device, memory_gb_per_s=1.0).product_seconds(1, 1000, 1000, "float16")
    assert moved == pytest.approx(2 * (1000 + 1000 * 1000 + 1000) / 1e9)


def measured(device: Device) -> dict[str, object]:
    """Return what a rank finds on a machine that is exactly the device."""
    shapes = [list(shape) for t, i, o in PRODUCTS for shape in ((t, i, o), (t, o, i), (o, t, i))]
    products = {kind: [[shape, device.product_seconds(*shape, kind)] for shape in shapes]
                for kind in ("float32", "bfloat16")}  # fmt: skip
    attention = []
    for length, samples, heads, size in ATTENTION:
        operations = 7.0 * length * samples * heads * length * size
        attention.append([operations, float(length), device.attention_seconds(operations, length, "float32")])
    transfers = {kind: [[sent, device.inside[kind][0] * 1e-6 + sent / device.inside[kind][1] * 1e-9]
                        for sent in (4096.0, 2.0**24)] for kind in COLLECTIVES}  # fmt: skip
    layer, microbatch, step = device.layer_us * 1e-6, device.microbatch_us * 1e-6, device.step_us * 1e-6
    experts = layer + device.experts_us * 1e-6
    ring = layer + device.ring_us * 1e-6 + 4 * device.inside["point_to_point"][0] * 1e-6
    runs = {"plain": (2, 2, layer), "deep": (6, 2, layer), "long": (2, 6, layer), "experts": (2, 2, experts),
            "experts deep": (6, 2, experts), "ring": (2, 2, ring), "ring deep": (6, 2, ring)}  # fmt: skip
    return {
        "memory": 2 * device.memory_gb * 2**30, "products": products["float32"],
        "bfloat16 products": products["bfloat16"], "attention": attention, "passes": device.memory_gb_per_s,
        "update": device.update_gb_per_s, "transfers": transfers,
        "runs": {name: step + m * (microbatch + n * each) for name, (n, m, each) in runs.items()},
    }  # fmt: skip


def test_calibration_finds_the_machine_that_was_measured() -> None:
    cpu = load_device("cpu")
    flat = dict.fromkeys(("float32", "float16", "bfloat16"), 0.09)
    machine = replace(cpu, name="found", ranks_per_node=2, product_half=(16.0, 4.0, 8.0), attention_tflops=flat,
                      product_tflops={"float32": 0.15, "float16": 0.15, "bfloat16": 0.6},
                      inside={kind: (10.0 + n, 3.0 + n) for n, kind in enumerate(COLLECTIVES)})  # fmt: skip
    assert device_of([measured(machine)] * 2, "found") == machine


def test_a_line_through_transfers_has_no_negative_part() -> None:
    assert fit_link([[1e3, 1e-5], [1e6, 1e-3]])[0] >= 0
    assert fit_link([[1e3, 2e-5], [1e6, 1e-5]])[1] > 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("plan configs/gpt_tiny.yaml --world-size 8 --search --device b200", "b200: no such device; use ascend910b"),
        ("plan configs/gpt_tiny.yaml --world-size 8 --search --device missing.yaml", "missing.yaml: no such file"),
        ("plan configs/gpt_tiny.yaml --search", "with --search, --world-size N"),
        ("plan configs/gpt_tiny.yaml --world-size 0 --search", "--world-size 0, --top 10: use numbers above zero"),
        ("plan configs/gpt_tiny.yaml --world-size 2 --search --memory-gb 0", "--memory-gb 0: use a number above zero"),
        ("plan configs/gpt_tiny.yaml --world-size 2 --search --every-rank", "with --search, no --every-rank"),
        ("plan configs/gpt_tiny.yaml --world-size 2 --top 3", "without --search, no --top"),
        ("plan configs/gpt_tiny.yaml --world-size 2 --search --num-layer 4", "--num-layer"),
        ("plan configs/pangu_38b.yaml --world-size 2 --search", "no legal layout of 2 ranks fits in 64 GiB"),
        ("plan configs/gpt_tiny.yaml --world-size 7 --search", "no layout of 7 ranks is legal for this configuration"),
        ("calibrate --output device.txt", "--output device.txt: name a .yaml file"),
        ("calibrate --ranks 0", "--ranks 0: use a number above zero"),
    ],
)
def test_mistakes_are_told(words: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) in (1, 2)
    assert says in capsys.readouterr().err


def test_calibration_is_for_cpus(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DEVICE_TARGET", "Ascend")
    assert main(["calibrate"]) == 1
    assert "calibrate measures a CPU; for Ascend, copy" in capsys.readouterr().err


@pytest.mark.slow
def test_this_machine_is_calibrated_and_planned_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "here.yaml")
    assert main(["calibrate", "--output", file, "--ranks", "2"]) == 0
    device = read_device(file)
    assert device.ranks_per_node == 2 and device.layer_us > 0 and device.microbatch_us > 0
    capsys.readouterr()
    assert main(["plan", "configs/gpt_tiny.yaml", "--world-size", "2", "--search", "--device", file]) == 0
    out = capsys.readouterr().out
    assert "2 ranks of here" in out and out.count(" why: ") == 10
