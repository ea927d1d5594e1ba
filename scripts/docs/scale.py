"""Compiles the paper's models for TPUs and GPUs, and fills in docs/scale.md.

    pip install 'switch_jax[tpu,cuda-compile,plots]'
    python scripts/docs/scale.py

Needs no TPU and no GPU. Each program takes a minute or a few on two cores; programs that were
compiled before are read from the cache. The script may be stopped at any time and run again. It
also writes the compile results against which `performance/mesh_search.py` is tested.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from switch_jax.analysis import new_figure
from switch_jax.config import STACKS, load_config
from switch_jax.distributed import CHIPS, chip_of_topology
from switch_jax.errors import UserError
from switch_jax.model import expert_layers, padded_size, split_hops
from switch_jax.performance import draw_placement, suggest_meshes
from switch_jax.performance.mesh_search import estimate_step_seconds, predict_mesh

ROOT = Path(__file__).parents[2]
COMPILED_MESHES = ROOT / "tests/golden/compiled_meshes.json"


class Case(NamedTuple):
    """A preset on a machine, with a mesh and a number of microbatches."""

    preset: str
    topology: str
    mesh: str
    slices: int = 1
    accumulate: int = 1

    @property
    def overrides(self) -> dict[str, str]:
        mesh = {f"mesh.{key}": value for key, value in (x.split("=") for x in self.mesh.split())}
        return mesh | {"train.accumulate": str(self.accumulate)}

    @property
    def machine(self) -> str:
        return f"{self.slices} × {self.topology}" if self.slices > 1 else self.topology


CASES = [
    Case("switch_base", "v4:4x4x4", "data=1 expert=64"),
    Case("switch_base", "v5e:16x16", "slice=2 data=2 expert=128", slices=2),
    Case("switch_large", "v6e:16x16", "data=2 expert=128"),
    Case("switch_xxl", "v5p:8x8x8", "data=1 expert=128 model=4"),
    Case("switch_c", "v4:8x8x16", "data=1 expert=1024"),
    Case("switch_c", "v5p:8x8x8", "data=1 expert=512"),
    Case("t5_xxl", "v5p:8x8x8", "data=128 model=4 fsdp=True"),
    Case("mswitch_base", "v5p:4x4x4", "data=1 expert=64"),
]
# The same model on the same chips, to see whether the arithmetic ranks meshes as compiling does.
RANKED = [
    CASES[0],
    Case("switch_base", "v4:4x4x4", "data=8 expert=8 fsdp=True"),
    Case("switch_base", "v4:4x4x4", "data=1 expert=16 model=4"),
]
# Switch-Base, Switch-C and Switch-XXL as they were compiled before what "Memory traffic" describes,
# counted as now: GB to and from HBM, and GiB of HBM.
BEFORE = {CASES[0]: (117.8, 20.5), CASES[4]: (153.4, 23.4), CASES[3]: (498.6, 69.6)}
GPU_PRESETS = ["t5_base", "t5_large", "switch_base", "switch_large", "mswitch_base", "t5_xxl"]
GPU_PRESETS += ["switch_xxl", "switch_c"]
GPUS = [8, 64, 512]
MICROBATCHES = [1, 2, 4, 8, 16, 32, 64]
MEMORY = ["model", "10⁹ parameters", "TPU", "chips", "mesh", "HBM used, GiB", "parameters"]
MEMORY += ["optimizer", "gradients, activations …"]
STEPS = ["model, TPU", "TFLOP", "GB to and from HBM", "GB sent along axes"]
STEPS += ["ms: compute / memory / links (/ slices)", "roofline step, ms", "MFU, at most"]
STEPS += ["MFU by XLA's cost model", "10⁹ tokens a day", "days", "compiled in, s"]
TRAFFIC = ["the same chips, mesh and batch", "GB to and from HBM: without", "with"]
TRAFFIC += ["HBM used, GiB: without", "with"]
GPU = ["model", "H100s", "mesh", "microbatches", "memory used, GiB", "TFLOP"]
GPU += ["GB to and from memory", "ms: compute / memory / network", "roofline step, ms"]
GPU += ["MFU, at most"]
RANKING = ["model", "TPU", "mesh", "step, ms", "compiled", "memory, GiB", "compiled"]
GROUPS = (2**11, 2**14, 2**17, 2**20)
FACTORS = (1.0, 1.05, 1.1, 1.15, 1.25, 1.5, 2.0)


def compiled(case: Case) -> dict:
    """Returns the result of `switch-jax compile --json`."""
    command = [sys.executable, "-m", "switch_jax", "compile", "--json"]
    command += ["--config", f"configs/{case.preset}.py", "--topology", case.topology]
    command += ["--slices", str(case.slices)]
    command += [f"--config.{key}={value}" for key, value in case.overrides.items()]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    result = json.loads(done.stdout)
    used, available = (
        gib(result[f"hbm_{name}"]) for name in ("bytes_per_device", "available_bytes")
    )
    print(f"{case.preset:14}{case.machine:16}{used} of {available} GiB", flush=True)
    return result


def gib(size: float) -> str:
    return f"{size / 2**30:.1f}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Returns a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mesh_text(result: dict) -> str:
    return " · ".join(f"{axis} {n}" for axis, n in result["mesh"].items() if n > 1)


def memory_row(case: Case, result: dict) -> list[str]:
    used, available = result["hbm_bytes_per_device"], result["hbm_available_bytes"]
    rest = used - result["parameter_bytes"] - result["optimizer_bytes"]
    return [
        case.preset,
        f"{result['params'] / 1e9:,.1f}",
        case.machine,
        f"{result['devices']:,}",
        mesh_text(result) + (", FSDP" if "fsdp" in case.mesh else ""),
        f"{gib(used)} of {gib(available)} ({1 - used / available:.0%} to spare)",
        gib(result["parameter_bytes"]),
        gib(result["optimizer_bytes"]),
        gib(rest),
    ]


def step_row(case: Case, result: dict) -> list[str]:
    sent: dict[str, float] = {}
    for by_axis in result["collective_bytes"].values():
        for axes, size in by_axis.items():
            sent[axes] = sent.get(axes, 0.0) + size
    along = ", ".join(f"{axes} {size / 1e9:.1f}" for axes, size in sent.items() if size > 5e7)
    seconds = result["seconds_by_resource"]
    return [
        f"{case.preset}, {case.machine}",
        f"{result['flops_per_device'] / 1e12:.1f}",
        f"{result['memory_traffic_bytes'] / 1e9:.0f}",
        along,
        " / ".join(f"{1e3 * value:.0f}" for value in seconds.values()),
        f"{1e3 * result['step_seconds_roofline']:.0f} ({result['binding']})",
        f"{result['mfu_roofline']:.0%}",
        f"{result['mfu_estimated']:.0%}",
        f"{result['tokens_per_day'] / 1e9:,.0f}",
        f"{result['days_to_paper_tokens']:.1f}",
        f"{result['compile_seconds']:.0f}",
    ]


def traffic_row(case: Case, result: dict) -> list[str]:
    traffic, used = BEFORE[case]
    now = f"{result['memory_traffic_bytes'] / 1e9:.1f}"
    memory = gib(result["hbm_bytes_per_device"])
    place = f"{case.preset}, {case.machine}, {mesh_text(result)}"
    return [place, str(traffic), now, str(used), memory]


def gpu_case(preset: str, gpus: int) -> Case | None:
    """Returns the fewest microbatches, with a mesh, that are predicted to fit; None if none are."""
    topology = f"h100:{gpus}"
    chip, devices = chip_of_topology(topology)
    for accumulate in MICROBATCHES:
        values = {"train.accumulate": str(accumulate)}
        try:
            made = load_config(str(ROOT / f"configs/{preset}.py"), values)
            best = suggest_meshes(made, chip, devices)[0]
        except UserError:  # Switch-C's groups do not divide so few rows
            return None
        if best.fits:
            sizes = best.mesh | {"fsdp": best.fsdp}
            mesh = " ".join(f"{axis}={size}" for axis, size in sizes.items())
            return Case(preset, topology, mesh, accumulate=accumulate)
    return None


def gpu_row(case: Case, result: dict) -> list[str]:
    row = [
        case.preset,
        f"{result['devices']:,}",
        mesh_text(result) + (", FSDP" if result["fsdp"] else ""),
        str(case.accumulate),
        f"{gib(result['hbm_bytes_per_device'])} of {gib(result['hbm_available_bytes'])}",
    ]
    if not result["fits"]:
        return [*row, "does not fit", *[""] * 4]
    seconds = result["seconds_by_resource"]
    return [
        *row,
        f"{result['flops_per_device'] / 1e12:.1f}",
        f"{result['memory_traffic_bytes'] / 1e9:,.0f}",
        " / ".join(f"{1e3 * value:,.0f}" for value in seconds.values()),
        f"{1e3 * result['step_seconds_roofline']:,.0f} ({result['binding']})",
        f"{result['mfu_roofline']:.0%}",
    ]


def compiled_mesh(case: Case, result: dict) -> dict:
    """Returns what `performance/mesh_search.py` predicts, of a compiled program; None: no fit."""
    seconds, traffic = result["seconds_by_resource"], result["memory_traffic_bytes"]
    return {
        "preset": case.preset,
        "topology": case.topology,
        "slices": case.slices,
        "accumulate": case.accumulate,
        "mesh": result["mesh"],
        "fsdp": result["fsdp"],
        "step_ms": seconds and round(1e3 * estimate_step_seconds(seconds)),
        "memory_gib": round(result["hbm_bytes_per_device"] / 2**30, 1),
        "hbm_traffic_gb": traffic and round(traffic / 1e9),
    }


def ranking_row(case: Case, result: dict) -> list[str]:
    made = load_config(str(ROOT / f"configs/{case.preset}.py"), case.overrides)
    chip, fsdp = CHIPS[result["device_kind"]], result["fsdp"]
    one = predict_mesh(made, chip, result["mesh"], fsdp=fsdp)
    seconds = result["seconds_by_resource"]  # None if the program does not fit
    return [
        case.preset,
        case.machine,
        mesh_text(result) + (", FSDP" if fsdp else ""),
        f"{1e3 * one.step_seconds:.0f}",
        f"{1e3 * estimate_step_seconds(seconds):.0f}" if seconds else "does not fit",
        gib(one.memory),
        gib(result["hbm_bytes_per_device"]),
    ]


def switch_c(group_size: int, factor: float) -> tuple[float, float]:
    """Returns slots per token and the share of dropped tokens, for routing balanced on average."""
    values = {"moe.group_size": str(group_size), "moe.capacity_factor": str(factor)}
    made = load_config(str(ROOT / "configs/switch_c.py"), values)
    layers = expert_layers(made)
    tokens = np.array([made.length(layer.stack) for layer in layers])
    slots = np.array([layer.slots_per_token for layer in layers])
    dropped = np.array([layer.dropped_if_uniform for layer in layers])
    return tokens @ slots / tokens.sum(), tokens @ dropped / tokens.sum()


def simulated(stack: str, devices: int = 1024, seed: int = 0) -> dict[str, float]:
    """Returns the shares of tokens that Switch-C drops in each hop and at the experts.

    A simulation with random numbers of one layer, whose router selects all experts with the same
    probability.
    """
    made = load_config(str(ROOT / "configs/switch_c.py"))
    layer = next(x for x in expert_layers(made) if x.stack == stack)
    E, local = made.moe.num_experts, made.data.batch_size * made.length(stack) // devices
    most = local * made.moe.capacity_factor
    first, second = split_hops(devices, most)
    rng, span = np.random.default_rng(seed), layer.group_tokens // local
    expert = rng.integers(0, E, (devices, local))
    source = np.arange(devices)[:, None] + np.zeros_like(expert)
    owner, alive, lost = expert // (E // devices), np.ones(expert.shape, bool), {}

    def limit(name: str, key: np.ndarray, room: int) -> None:
        """Keeps the first `room` items of each key, in token order."""
        order = np.flatnonzero(alive.ravel())
        keys = key.ravel()[order]
        by_key = np.argsort(keys, kind="stable")
        begin = np.concatenate([[True], np.diff(keys[by_key]) != 0])
        start = np.maximum.accumulate(np.where(begin, np.arange(len(keys)), 0))
        over = order[by_key[np.arange(len(keys)) - start >= room]]
        alive.ravel()[over] = False
        lost[name] = len(over) / alive.size

    digit = owner % first
    limit("first hop", source * devices + digit, padded_size(most / first))
    between = source // first * first + digit
    limit("second hop", between * devices + owner // first, padded_size(most / second))
    limit("experts", source // span * E + expert, layer.capacity)
    return lost


def draw_slots(path: Path) -> None:
    figure = new_figure(1, 1, (6.4, 4.2))
    axes = figure.axes[0]
    factors = np.linspace(1, 2.5, 31)
    for group_size in GROUPS:
        slots, dropped = np.array([switch_c(group_size, float(f)) for f in factors]).T
        axes.plot(slots, 100 * dropped, ".-", label=f"groups of {group_size:,} tokens")
    slots, dropped = switch_c(2**17, 1.25)
    axes.plot([slots], [100 * dropped], "k*", markersize=14, label="configs/switch_c.py")
    axes.set(yscale="log", ylim=(0.01, 40), xlim=(1, 4.5))
    axes.set(xlabel="expert slots computed per token", ylabel="tokens dropped, %")
    axes.set_title("Switch-C, 2²⁰ tokens a batch, balanced routing")
    axes.legend()
    figure.savefig(path, dpi=144)


def main() -> None:
    results = {case: compiled(case) for case in [*CASES, *RANKED[1:]]}
    gpu_cases = [case for gpus in GPUS for p in GPU_PRESETS if (case := gpu_case(p, gpus))]
    on_gpus = {case: compiled(case) for case in gpu_cases}
    ranked = [*RANKED, *CASES[1:]]
    stored = [compiled_mesh(case, results[case]) for case in ranked]
    stored += [compiled_mesh(case, result) for case, result in on_gpus.items()]
    lines = ",\n".join(f"  {json.dumps(each)}" for each in stored)
    COMPILED_MESHES.write_text(f"[\n{lines}\n]\n")
    images = ROOT / "docs/images"
    draw_slots(images / "switch_c_slots.png")
    draw_placement(results[CASES[3]], images / "switch_xxl_placement.png")
    losses = {stack: simulated(stack) for stack in STACKS}
    blocks = {
        "memory": table(MEMORY, [memory_row(case, results[case]) for case in CASES]),
        "steps": table(STEPS, [step_row(case, results[case]) for case in CASES]),
        "ranking": table(RANKING, [ranking_row(c, results[c]) for c in ranked]),
        "traffic": table(TRAFFIC, [traffic_row(case, results[case]) for case in BEFORE]),
        "gpus": table(GPU, [gpu_row(case, result) for case, result in on_gpus.items()]),
        "slots": table(
            ["capacity factor", *(f"{size:,} tokens" for size in GROUPS)],
            [
                [str(f), *("{:.2f} slots, {:.2%}".format(*switch_c(size, f)) for size in GROUPS)]
                for f in FACTORS
            ],
        ),
        "losses": table(
            ["Switch-C on 1024 chips", *losses["encoder"]],
            [[stack, *(f"{x:.3%}" for x in lost.values())] for stack, lost in losses.items()],
        ),
    }
    page = ROOT / "docs/scale.md"
    text = page.read_text()
    for name, block in blocks.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}{block}\n{end}{rest.partition(end)[2]}"
    page.write_text(text)
    print(page)


if __name__ == "__main__":
    main()
