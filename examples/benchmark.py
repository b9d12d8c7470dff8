"""What the fine-grained loss costs: operations, memory and time, beside what people write and beside a training step.

Then, on a GPU, what the objectives add to a step of ViT-B/16; and what evaluation on voc20 costs beside the model's
forward, what boxes cost the loader, how soon commands answer.

    python -m examples.benchmark                       every shape, float32 and bfloat16; minutes on 2 cores
    python -m examples.benchmark --shapes 64,196,77,512 --dtype float32 --repeats 5

Operations and bytes are counted and the same on every machine. Times are taken side by side: each round runs every
implementation once, and a ratio is the median over rounds of two times of one round, with its quartiles. What takes
long is measured in fewer rounds, three at least.

Prints tables, and writes benchmark.json and benchmark.png (`--output`, runs/benchmark by default).
"""

import argparse
import gc
import json
import logging
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from sparc_loss import functional, fused

from .model_step import model_steps, show_model_steps
from .regions_speed import regions_speed, show_regions_speed
from .segmentation_speed import segmentation_speed, show_segmentation_speed
from .start_up import show_start_up, start_up
from .update_step import Sizes, clip_cost, fine_grained_cost, show_update_steps, update_steps

SHAPES = ["64,196,77,512", "256,196,77,512", "256,49,77,512", "64,576,77,768"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MIB = 2**20
# An implementation that has taken so many seconds is left out of the further rounds, after so many.
LONGEST = 20.0
FEWEST_ROUNDS = 3


# What is compared: each takes a batch and returns a loss, but for the products, which return gradients


@dataclass(frozen=True)
class Batch:
    patch_features: Tensor  # [B, P, D]
    token_features: Tensor  # [B, L, D]
    token_mask: Tensor  # [B, L]
    logit_scale: Tensor
    image_features: Tensor  # [B, D], for the global loss
    text_features: Tensor  # [B, D]

    def inputs(self) -> tuple[Tensor, ...]:
        return self.patch_features, self.token_features, self.logit_scale, self.image_features, self.text_features


def make_batch(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str = "cpu") -> Batch:
    """Random features; captions of about 16 tokens, and one that fills the context, as some one always does."""
    b, p, length, d = shape
    generator = torch.Generator().manual_seed(0)
    numbers = torch.empty(b).log_normal_(2.65, 0.5, generator=generator).round().clamp(min(3, length), length)
    numbers[0] = length

    def features(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype).requires_grad_()

    return Batch(
        patch_features=features(b, p, d),
        token_features=features(b, length, d),
        token_mask=(torch.arange(length) < numbers[:, None]).to(device),
        logit_scale=torch.tensor(14.3, device=device, requires_grad=True),
        image_features=features(b, d),
        text_features=features(b, d),
    )


def eager_loss(batch: Batch) -> Tensor:
    return functional.fine_grained_loss(
        batch.patch_features, batch.token_features, batch.token_mask, batch.logit_scale
    )


def fused_loss(batch: Batch, recompute: bool = False) -> Tensor:
    return fused.fine_grained_loss(
        batch.patch_features, batch.token_features, batch.token_mask, batch.logit_scale, recompute=recompute
    )


def contrast_loss(batch: Batch, images: int = 3, **options: Any) -> Tensor:
    """The contrast with other images alone."""
    features = batch.patch_features, batch.token_features, batch.token_mask, batch.logit_scale
    return fused.image_contrastive_loss(*features, images, **options)


def listing_loss(batch: Batch, float32_similarity: bool = False) -> Tensor:
    """The paper's Listing 1 as people write it: full length, one-hot labels, the logits once for each direction.

    In bfloat16 its similarities are bfloat16 too, as under autocast: a gradient that is wrong by a tenth. With
    `float32_similarity` these, and with them the weights, are float32.
    """
    patches, tokens, mask = batch.patch_features, batch.token_features, batch.token_mask.to(batch.patch_features.dtype)
    if float32_similarity:
        similarity = torch.einsum("bld,bpd->blp", tokens.float(), patches.float())
    else:
        similarity = torch.einsum("bld,bpd->blp", tokens, patches)
    lowest = similarity.min(dim=-1, keepdim=True).values
    highest = similarity.max(dim=-1, keepdim=True).values
    similarity = (similarity - lowest) / (highest - lowest + 1e-8)
    similarity = torch.where(similarity < 1 / patches.shape[1], torch.zeros_like(similarity), similarity)
    weights = similarity / similarity.sum(dim=-1, keepdim=True)
    grouped = F.normalize(torch.einsum("blp,bpd->bld", weights.to(patches.dtype), patches), dim=-1)
    tokens = F.normalize(tokens, dim=-1)

    labels = torch.eye(tokens.shape[1], dtype=tokens.dtype, device=tokens.device).expand(len(tokens), -1, -1)
    out = (1 - mask)[:, None, :] * -1e9
    groups_to_tokens = torch.einsum("bmd,bnd->bmn", grouped, tokens) * batch.logit_scale + out
    tokens_to_groups = torch.einsum("bmd,bnd->bmn", tokens, grouped) * batch.logit_scale + out
    loss = -(labels * groups_to_tokens.log_softmax(dim=-1)).sum(dim=-1)
    loss = (loss - (labels * tokens_to_groups.log_softmax(dim=-1)).sum(dim=-1)) / 2
    return (loss * mask).sum() / mask.sum()


def clip_loss(batch: Batch) -> Tensor:
    """open_clip's global loss of as many pairs, on one process."""
    from open_clip.loss import ClipLoss

    image, text = F.normalize(batch.image_features, dim=-1), F.normalize(batch.text_features, dim=-1)
    return ClipLoss()(image, text, batch.logit_scale.to(image.dtype))


def matrix_products(batch: Batch) -> list[Tensor]:
    """The products of patches and valid tokens alone, forward and backward: below them nothing can be."""
    gradients = [torch.empty_like(features) for features in batch.inputs()[:2]]
    with torch.no_grad():
        for index, number in enumerate(batch.token_mask.sum(dim=1).tolist()):
            patches, tokens = batch.patch_features[index].float(), batch.token_features[index, :number].float()
            similarity = tokens @ patches.T
            grouped = similarity @ patches
            by_weights = grouped @ patches.T
            gradients[1][index, :number] = by_weights @ patches
            gradients[0][index] = torch.cat([similarity, by_weights]).T @ torch.cat([grouped, tokens])
    return gradients


def implementations(dtype: str, compiled: bool) -> dict[str, Callable[[Batch], Tensor | list[Tensor]]]:
    named: dict[str, Callable] = {
        "fused": fused_loss,
        "fused, recompute": partial(fused_loss, recompute=True),
        "eager": eager_loss,
        "listing": listing_loss,
        "ClipLoss": clip_loss,
        "3 image negatives": contrast_loss,
        "3, both directions": partial(contrast_loss, direction="both"),
        "3, highest patches": partial(contrast_loss, direction="both", threshold=1.0),
        "7, highest patches": partial(contrast_loss, images=7, direction="both", threshold=1.0),
        "matrix products": matrix_products,
    }
    if dtype != "float32":
        named["listing, float32 similarities"] = partial(listing_loss, float32_similarity=True)
    if compiled:
        # A compiled function of its own for every shape: sizes become constants.
        named["eager, compiled"] = torch.compile(eager_loss, dynamic=False)
        named["listing, compiled"] = torch.compile(listing_loss, dynamic=False)
    return named


# Counting and timing


def step(loss: Callable[[Batch], Tensor | list[Tensor]], batch: Batch) -> list[Tensor | None]:
    """Forward and backward; the gradients."""
    value = loss(batch)
    if not isinstance(value, Tensor):
        return value
    value.backward()
    gradients = [tensor.grad for tensor in batch.inputs()]
    for tensor in batch.inputs():
        tensor.grad = None
    return gradients


def count_flops(loss: Callable, batch: Batch) -> int:
    """Floating-point operations of the matrix products of a step: two for each multiplication."""
    with FlopCounterMode(display=False) as counter:
        step(loss, batch)
    return counter.get_total_flops()


def saved_bytes(loss: Callable, batch: Batch) -> int:
    """Bytes that autograd saves for backward beyond the inputs."""
    inputs = {tensor.untyped_storage().data_ptr() for tensor in (*batch.inputs(), batch.token_mask)}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss(batch)
    del value
    return sum(size for address, size in saved.items() if address not in inputs)


def allocated_bytes(action: Callable[[], object], device: str = "cpu") -> tuple[int, int]:
    """The most bytes allocated at any moment of `action`, and those that its result keeps at its end."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = action()
        torch.cuda.synchronize()
        kept, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        del result
        return peak - before, kept - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = action()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    del result
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    now = peak = 0
    for _, change in sorted(changes, key=lambda event: event[0]):
        now += change
        peak = max(peak, now)
    return peak, now


def times(named: dict[str, Callable], batch: Batch, repeats: int) -> dict[str, list[float]]:
    """Seconds of `repeats` steps of each, taken in turns after one to warm up; of fewer where they take minutes."""
    taken: dict[str, list[float]] = {name: [] for name in named}
    for repeat in range(repeats + 1):
        for name, loss in named.items():
            if len(taken[name]) >= FEWEST_ROUNDS and sum(taken[name]) > LONGEST:
                continue
            synchronize(batch)
            start = time.perf_counter()
            step(loss, batch)
            synchronize(batch)
            if repeat:
                taken[name].append(time.perf_counter() - start)
    return taken


def synchronize(batch: Batch) -> None:
    if batch.patch_features.is_cuda:
        torch.cuda.synchronize()


def quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


# The fine-grained loss by itself


def measure(shape: tuple[int, int, int, int], dtype: str, repeats: int, compiled: bool, device: str) -> list[dict]:
    """One row for each implementation."""
    torch.compiler.reset()
    batch = make_batch(shape, DTYPES[dtype], device)
    named = implementations(dtype, compiled)
    seconds = times(named, batch, repeats)
    rows = []
    for name, loss in named.items():
        has_graph = name != "matrix products"
        peak, _ = allocated_bytes(partial(step, loss, batch), device)
        rows.append(
            {
                "shape": shape,
                "tokens": batch.token_mask.sum().item(),
                "dtype": dtype,
                "implementation": name,
                # What a compiler makes of the products is not seen by the counter.
                "flops": None if "compiled" in name else count_flops(loss, batch),
                "saved_bytes": saved_bytes(loss, batch) if has_graph else None,
                "held_bytes": allocated_bytes(partial(loss, batch), device)[1] if has_graph else None,
                "peak_bytes": peak,
                "seconds": quartiles(seconds[name]),
                "times_fused": quartiles([a / b for a, b in zip(seconds[name], seconds["fused"], strict=False)]),
                "rounds": len(seconds[name]),
            }
        )
    return rows


def show(rows: list[dict]) -> None:
    first = rows[0]
    b, p, length, d = first["shape"]
    batch = f"B={b} P={p} L={length} D={d} {first['dtype']}, {first['tokens']} tokens"
    print(
        f"\n{batch}\n{'':29} {'GFLOP':>7} {'saved MiB':>9} {'held MiB':>8} {'peak MiB':>8} {'ms':>18} {'x fused':>17}"
    )
    for row in rows:
        low, median, high = (1e3 * value for value in row["seconds"])
        ratios = "{1:6.2f} ({0:.2f}-{2:.2f})".format(*row["times_fused"])
        counted = [
            "-" if row[key] is None else f"{row[key] / unit:.{digits}f}"
            for key, unit, digits in (("flops", 1e9, 2), ("saved_bytes", MIB, 1), ("held_bytes", MIB, 1))
        ]
        print(
            f"{row['implementation']:29} {counted[0]:>7} {counted[1]:>9} {counted[2]:>8} "
            f"{row['peak_bytes'] / MIB:8.1f} {f'{median:.1f} ({low:.1f}-{high:.1f})':>18} {ratios:>17}"
            + (f"  {row['rounds']} rounds" if row["rounds"] < first["rounds"] else "")
        )


# The whole


def machine(device: str) -> dict[str, object]:
    import open_clip

    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "processor": torch.cuda.get_device_name() if device == "cuda" else processor,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
    }


def draw(results: dict, path: Path) -> None:
    """Times, memory, a step's operations by objective, and how one device's cost grows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    blocks: dict[str, dict[str, dict]] = {}
    for row in results["losses"]:
        if row["dtype"] == results["losses"][0]["dtype"]:
            label = "B={} P={}\nL={} D={}".format(*row["shape"])
            blocks.setdefault(label, {})[row["implementation"]] = row
    shown = [name for name in next(iter(blocks.values())) if name not in ("matrix products", "ClipLoss")]
    width = 0.8 / len(shown)
    for number, name in enumerate(shown):
        at = [index + (number - (len(shown) - 1) / 2) * width for index in range(len(blocks))]
        rows = [block[name] for block in blocks.values()]
        floors = [block["matrix products"]["seconds"][1] for block in blocks.values()]
        axes[0, 0].bar(
            at, [row["seconds"][1] / floor for row, floor in zip(rows, floors, strict=True)], width, label=name
        )
        axes[0, 1].bar(at, [row["peak_bytes"] / MIB for row in rows], width, label=name)
    axes[0, 0].axhline(1, color="black", linewidth=0.8)
    axes[0, 0].set(title="Time, in bare matrix products over valid tokens", ylabel="times")
    axes[0, 1].set(title="Peak memory of forward and backward", ylabel="MiB")
    for axis in axes[0]:
        axis.set_xticks(range(len(blocks)), list(blocks))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize="small", ncols=5, loc="outside upper center")

    *steps, model = results["table11"]
    baselines = [row for row in steps if row["objective"] != "CLIP"]
    for number, objective in enumerate(dict.fromkeys(row["objective"] for row in baselines)):
        rows = [row for row in baselines if row["objective"] == objective]
        shares = [100 * row["over_clip"] for row in rows]
        axes[1, 0].plot([row["batch_size"] for row in rows], shares, marker="o", color=f"C{number}", label=objective)
        theirs = [row for row in rows if row["paper"] and row["paper_over_clip"] > 0]
        at, shares = [row["batch_size"] for row in theirs], [100 * row["paper_over_clip"] for row in theirs]
        axes[1, 0].plot(at, shares, marker="x", linestyle="", color=f"C{number}")
    title = f"Operations of a {model['model']} step over CLIP's (x: the paper)"
    axes[1, 0].set(title=title, xlabel="batch size", ylabel="%", yscale="log")
    axes[1, 0].set_xscale("log", base=2)
    axes[1, 0].legend(fontsize="small")

    factors = [2**n for n in range(6)]
    base = Sizes(64, 4, 196, 77, 16.5)
    growing: dict[str, Callable[[int], Sizes]] = {
        "fine-grained, patches P x": lambda n: Sizes(64, 4, 196 * n, 77, 16.5),
        "fine-grained, tokens L x": lambda n: Sizes(64, 4, 196, 77 * n, 16.5 * n),
        "fine-grained, pairs of a device x": lambda n: Sizes(64 * n, 4, 196, 77, 16.5),
        "fine-grained, ranks x": lambda n: Sizes(64, 4 * n, 196, 77, 16.5),
    }
    for label, sizes in growing.items():
        costs = [fine_grained_cost(sizes(n)).flops / fine_grained_cost(base).flops for n in factors]
        axes[1, 1].plot(factors, costs, marker="o", label=label)
    costs = [clip_cost(growing["fine-grained, ranks x"](n)).flops / clip_cost(base).flops for n in factors]
    axes[1, 1].plot(factors, costs, linestyle="--", color="grey", label="global loss, ranks x")
    axes[1, 1].set(title="Operations of one device's loss", xlabel="x", ylabel="times", yscale="log")
    axes[1, 1].set_xscale("log", base=2)
    axes[1, 1].legend(fontsize="small")
    about = results["machine"]
    figure.supxlabel(f"{about['processor']}, {about['threads']} threads, torch {about['torch']}", fontsize="small")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def shape(text: str) -> tuple[int, int, int, int]:
    sizes = tuple(int(size) for size in text.split(","))
    if len(sizes) != 4 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; expected B,P,L,D such as 64,196,77,512")
    return sizes


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.benchmark", description=__doc__.split("\n\n")[0])
    parser.add_argument("--shapes", nargs="+", type=shape, default=[shape(each) for each in SHAPES], metavar="B,P,L,D")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="rounds that are timed (default: 7)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--threads", type=int, default=None, metavar="N", help="of torch (default: torch's own choice)"
    )
    parser.add_argument(
        "--images", type=int, default=8, metavar="N", help="of voc20; 0 leaves it out (default: %(default)s)"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, most of the running time")
    parser.add_argument("--quick", action="store_true", help="one tiny shape, 2 rounds, no torch.compile, no voc20")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"), metavar="FOLDER")
    options = parser.parse_args(arguments)
    if options.quick:
        options.shapes, options.dtype, options.repeats, options.no_compile = [(4, 9, 12, 16)], ["float32"], 2, True
        options.images = 0
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True  # as open_clip_train.main does
    results: dict = {"machine": machine(options.device), "losses": []}
    print(", ".join(f"{name} {value}" for name, value in results["machine"].items()), f"of {os.cpu_count()} cores")
    for dtype in options.dtype:
        for each in options.shapes:
            rows = measure(each, dtype, options.repeats, not options.no_compile, options.device)
            results["losses"] += rows
            show(rows)
    if options.device == "cuda":
        results["model_steps"] = model_steps()
        show_model_steps(results["model_steps"])
    results["table11"] = update_steps()
    show_update_steps(results["table11"])
    if options.images:
        results["voc20"] = segmentation_speed(options.images)
        show_segmentation_speed(results["voc20"])
        results["regions"] = regions_speed()
        show_regions_speed(results["regions"])
        results["start_up"] = start_up()
        show_start_up(results["start_up"])

    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "benchmark.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    draw(results, options.output / "benchmark.png")
    print(f"\nWritten to {options.output}: benchmark.json, benchmark.png")


def quiet_libraries() -> None:
    """Or the profiler tells of every start and stop, the compiler of itself, open_clip of a model without weights."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch._inductor")
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set")
    logging.getLogger().setLevel(logging.ERROR)


if __name__ == "__main__":
    quiet_libraries()
    main()
