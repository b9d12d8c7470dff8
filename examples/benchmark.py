"""What the fine-grained loss costs: operations, memory and time, beside what people write and beside a training step.

    python -m examples.benchmark                       every shape, float32 and bfloat16; minutes on 2 cores
    python -m examples.benchmark --shapes 64,196,77,512 --dtype float32 --repeats 5

Operations and bytes are counted and the same on every machine. Times are taken side by side: each round runs every
implementation once, and a ratio is the median over rounds of two times of one round, with its quartiles.

Prints tables, and writes benchmark.json and benchmark.png (`--output`, runs/benchmark by default).
"""

import argparse
import gc
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from sparc_loss import functional, fused, surface_embeddings

SHAPES = ["64,196,77,512", "256,196,77,512", "256,49,77,512", "64,576,77,768"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MIB = 2**20


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
        events = json.loads(path.read_text())["traceEvents"]
    del result
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    now = peak = 0
    for _, change in sorted(changes, key=lambda event: event[0]):
        now += change
        peak = max(peak, now)
    return peak, now


def times(named: dict[str, Callable], batch: Batch, repeats: int) -> dict[str, list[float]]:
    """Seconds of `repeats` steps of each, taken in turns after one to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in named}
    for repeat in range(repeats + 1):
        for name, loss in named.items():
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
                "times_fused": quartiles([a / b for a, b in zip(seconds[name], seconds["fused"], strict=True)]),
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
        )


# A whole update step (the paper's Table 11)


PAPER = {  # batch size -> objective -> (TFLOPs, peak MB) of one device
    2048: {"CLIP": (1.15, 4394), "SPARC": (1.15, 4408)},
    16384: {"CLIP": (9.14, 8578), "SPARC": (9.19, 8620)},
}
# The paper does not say over how many devices: of the powers of two, 256 brings our CLIP row nearest (15 %).
DEVICES = 256
BATCH_SIZES = (2048, 4096, 8192, 16384)


@dataclass(frozen=True)
class Sizes:
    """One device's share of a step."""

    pairs: int  # on this device
    ranks: int
    patches: int = 196
    length: int = 77
    tokens: float = 16.5  # that count, of a caption
    dim: int = 512
    bytes_each: int = 2  # of a feature, under bfloat16 autocast


@dataclass(frozen=True)
class Cost:
    flops: float
    bytes: float  # held at the fullest moment of the loss, beyond what the model itself keeps

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


def clip_cost(sizes: Sizes) -> Cost:
    """ClipLoss over ranks, with local_loss: logits of the own pairs against all, once for each direction."""
    everyone = sizes.pairs * sizes.ranks
    # Logits and their gradient in float32; gathered features of both sides and their gradients.
    return Cost(
        12 * sizes.pairs * everyone * sizes.dim,
        2 * 2 * 4 * sizes.pairs * everyone + 4 * sizes.bytes_each * everyone * sizes.dim,
    )


def fine_grained_cost(sizes: Sizes) -> Cost:
    """The fused loss: twelve operations for each valid token, patch and dimension, six for two tokens and a dimension.

    Every caption as long as the average, nothing padded. Held: the gradients, and the workspace of one group.
    """
    tokens = sizes.pairs * sizes.tokens
    return Cost(
        (12 * sizes.patches + 6 * sizes.tokens) * tokens * sizes.dim,
        sizes.bytes_each * sizes.pairs * (sizes.patches + sizes.length) * sizes.dim + fused.CPU_CHUNK_BYTES,
    )


# An objective's own cost on one device; a rival is one more line. Surfacing is counted with the model.
OBJECTIVES: dict[str, Callable[[Sizes], Cost]] = {
    "CLIP": clip_cost,
    "SPARC": lambda sizes: clip_cost(sizes) + fine_grained_cost(sizes),
}


@cache
def model_cost(name: str, surfaced: bool) -> tuple[Cost, int]:
    """What one pair costs in a model of open_clip, counted on the meta device, and the model's parameters.

    Bytes are what autograd saves for backward under bfloat16 autocast's sizes, beyond the parameters.
    """
    import open_clip

    model = open_clip.create_model(name, device="meta")
    if surfaced:
        surface_embeddings(model, open_clip.get_tokenizer(name))
    model.train()
    size = model.visual.image_size
    height, width = size if isinstance(size, tuple) else (size, size)
    costs = []
    for pairs in (1, 2):
        images = torch.empty(pairs, 3, height, width, device="meta")
        texts = torch.zeros(pairs, model.context_length, dtype=torch.long, device="meta")
        parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        saved: dict[int, tuple[StorageWeakRef, int]] = {}

        def pack(tensor: Tensor, parameters=parameters, saved=saved) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in parameters:
                saved[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            return tensor

        with FlopCounterMode(display=False) as counter:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                output = model(images, texts)
            values = output.values() if isinstance(output, dict) else output
            sum(value.float().sum() for value in values if value.requires_grad and value.ndim).backward()
        costs.append(Cost(counter.get_total_flops(), sum(size for _, size in saved.values()) / 2))
    one, two = costs
    return Cost(two.flops - one.flops, two.bytes - one.bytes), sum(each.numel() for each in model.parameters())


def update_steps(name: str = "ViT-B-16") -> list[dict]:
    """One device's update step for each batch size and objective."""
    plain, parameters = model_cost(name, surfaced=False)
    surfaced, _ = model_cost(name, surfaced=True)
    rows = []
    for batch_size in BATCH_SIZES:
        sizes = Sizes(batch_size // DEVICES, DEVICES)
        for objective, cost in OBJECTIVES.items():
            model, loss = (plain if objective == "CLIP" else surfaced), cost(sizes)
            rows.append(
                {
                    "batch_size": batch_size,
                    "objective": objective,
                    "tflops": (model.flops * sizes.pairs + loss.flops) / 1e12,
                    # Weights, gradients and AdamW's two moments in float32.
                    "megabytes": (16 * parameters + model.bytes * sizes.pairs + loss.bytes) / 1e6,
                    "paper": PAPER.get(batch_size, {}).get(objective),
                }
            )
    shares = {
        "surfacing": (surfaced.flops - plain.flops) / plain.flops,
        "fine-grained loss": fine_grained_cost(Sizes(1, 1)).flops / plain.flops,
    }
    return [*rows, {"model": name, "gflops_of_a_pair": plain.flops / 1e9, "parameters": parameters, "shares": shares}]


def show_update_steps(rows: list[dict]) -> None:
    *rows, model = rows
    print(
        f"\nOne update step of {model['model']} on one of {DEVICES} devices, counted "
        f"({model['gflops_of_a_pair']:.1f} GFLOP for a pair, {model['parameters'] / 1e6:.1f} M parameters)"
    )
    print(f"{'B':>6} {'':10} {'TFLOP':>8} {'paper':>6} {'over CLIP':>10} {'paper':>7} {'MB':>8} {'paper':>6}")
    for row in rows:
        clip = next(r for r in rows if r["batch_size"] == row["batch_size"] and r["objective"] == "CLIP")
        paper, paper_clip = row["paper"], clip["paper"]
        theirs = (f"{paper[0]:.2f}", f"{paper[0] / paper_clip[0] - 1:+.2%}", str(paper[1])) if paper else ("",) * 3
        over = row["tflops"] / clip["tflops"] - 1
        print(
            f"{row['batch_size']:6} {row['objective']:10} {row['tflops']:8.3f} {theirs[0]:>6} {over:+10.3%} "
            f"{theirs[1]:>7} {row['megabytes']:8.0f} {theirs[2]:>6}"
        )
    for part, share in model["shares"].items():
        print(f"  of a CLIP step, {part}: {share:+.3%}")


# The whole


def machine(device: str) -> dict[str, object]:
    import open_clip

    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
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
    """Times, memory, the step's share, and how one device's cost grows."""
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
        axis.legend(fontsize="small")

    model = results["table11"][-1]
    for number, (part, share) in enumerate(model["shares"].items()):
        axes[1, 0].barh(number, 100 * share)
        axes[1, 0].text(100 * share, number, f" {part} {share:.3%}", va="center")
    paper = PAPER[16384]["SPARC"][0] / PAPER[16384]["CLIP"][0] - 1
    axes[1, 0].barh(len(model["shares"]), 100 * paper, color="lightgrey")
    axes[1, 0].text(100 * paper, len(model["shares"]), f" the paper, in all {paper:.2%}", va="center")
    axes[1, 0].set(title=f"SPARC over CLIP, % of the operations of a {model['model']} step", xlim=(0, 1), yticks=[])

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
    figure.suptitle(f"{about['processor']}, {about['threads']} threads, torch {about['torch']}", fontsize="small")
    figure.savefig(path, dpi=100)


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
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, most of the running time")
    parser.add_argument("--quick", action="store_true", help="one tiny shape, 2 rounds, no torch.compile")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"), metavar="FOLDER")
    options = parser.parse_args(arguments)
    if options.quick:
        options.shapes, options.dtype, options.repeats, options.no_compile = [(4, 9, 12, 16)], ["float32"], 2, True
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    results: dict = {"machine": machine(options.device), "losses": []}
    print(", ".join(f"{name} {value}" for name, value in results["machine"].items()), f"of {os.cpu_count()} cores")
    for dtype in options.dtype:
        for each in options.shapes:
            rows = measure(each, dtype, options.repeats, not options.no_compile, options.device)
            results["losses"] += rows
            show(rows)
    results["table11"] = update_steps()
    show_update_steps(results["table11"])

    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "benchmark.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results, options.output / "benchmark.png")
    print(f"\nWritten to {options.output}: benchmark.json, benchmark.png")


if __name__ == "__main__":
    main()
