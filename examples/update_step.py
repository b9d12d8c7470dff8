"""What a whole update step of CLIP costs with each objective, counted: the paper's Table 11 again.

The model is counted on the meta device; the objectives are formulas, which the tests hold against what is counted and
allocated in small cases. Nothing of this is timed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

from sparc_loss import surface_embeddings
from sparc_loss.fused.groups import CPU_CHUNK_BYTES
from sparc_loss.losses import all_pairs

PAPER = {  # batch size -> objective -> (TFLOPs, peak MB) of one device
    2048: {
        "CLIP": (1.15, 4394),
        "SPARC": (1.15, 4408),
        "MGCA": (1.16, 4412),
        "PACL": (1.20, 4682),
        "FILIP": (1.37, 4394),
        "GLoRIA": (3.34, 8013),
    },
    16384: {
        "CLIP": (9.14, 8578),
        "SPARC": (9.19, 8620),
        "MGCA": (9.23, 8681),
        "PACL": (12.8, 14785),
        "FILIP": (27.25, 15463),
    },
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
        sizes.bytes_each * sizes.pairs * (sizes.patches + sizes.length) * sizes.dim + CPU_CHUNK_BYTES,
    )


def mgca_cost(sizes: Sizes, head_dim: int = 128, prototypes: int = 500) -> Cost:
    """MgcaLoss and MgcaHeads, at full length: every linear map and product once forward and twice backward."""
    length, patches, dim = sizes.length, sizes.patches, sizes.dim
    heads = 4 * (length + patches) * dim * head_dim + 4 * length * patches * head_dim
    contrast = (length**2 + patches**2) * dim + 2 * prototypes * dim
    # Fitted to what is allocated, in float32.
    numbers = 10.7 * (length + patches) * dim + 5.7 * patches**2 + 4.2 * length * patches
    return Cost(6 * sizes.pairs * (heads + contrast), 4 * sizes.pairs * numbers)


def all_pairs_cost(sizes: Sizes, flops: float, token_copies: float, block_copies: int) -> Cost:
    """An objective that scores the own images against the captions of all ranks by blocks, twice forward.

    Bytes, in float32: the gathered tokens, their copies and gradients; the blocks; six times the scores of all pairs,
    which every rank has. How many of each is fitted to what is allocated.
    """
    everyone = sizes.pairs * sizes.ranks
    numbers = (
        token_copies * everyone * sizes.length * sizes.dim
        + block_copies * all_pairs.BLOCK_NUMBERS
        + 6 * everyone**2
        + 4 * sizes.pairs * sizes.patches * sizes.dim
    )
    return Cost(sizes.pairs * everyone * sizes.dim * flops, 4 * numbers)


def filip_cost(sizes: Sizes) -> Cost:
    """FilipLoss, a fifth of patches and tokens dropped."""
    patches, tokens = sizes.patches - sizes.patches // 5, sizes.tokens - sizes.tokens // 5
    return all_pairs_cost(sizes, 8 * patches * tokens, token_copies=3.5, block_copies=3)


def pacl_cost(sizes: Sizes) -> Cost:
    """PaclLoss, of which the last product is not computed again; it gathers a text embedding for tokens."""
    one_token = replace(sizes, length=1, tokens=1)
    return all_pairs_cost(one_token, 8 * (2 * sizes.patches + 1) - 2, token_copies=4, block_copies=6)


def gloria_cost(sizes: Sizes) -> Cost:
    """GloriaLoss."""
    return all_pairs_cost(sizes, 8 * sizes.tokens * (2 * sizes.patches + 1), token_copies=4, block_copies=3)


# An objective's own cost on one device, beside the global loss. Surfacing is counted with the model.
OBJECTIVES: dict[str, Callable[[Sizes], Cost] | None] = {
    "CLIP": None,
    "SPARC": fine_grained_cost,
    "MGCA": mgca_cost,
    "PACL": pacl_cost,
    "FILIP": filip_cost,
    "GLoRIA": gloria_cost,
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
        clip = plain.flops * sizes.pairs + clip_cost(sizes).flops
        paper = PAPER.get(batch_size, {})
        for objective, cost in OBJECTIVES.items():
            model, loss = plain, clip_cost(sizes)
            if cost is not None:
                model, loss = surfaced, loss + cost(sizes)
            flops = model.flops * sizes.pairs + loss.flops
            rows.append(
                {
                    "batch_size": batch_size,
                    "objective": objective,
                    "tflops": flops / 1e12,
                    "over_clip": flops / clip - 1,
                    # Weights, gradients and AdamW's two moments in float32.
                    "megabytes": (16 * parameters + model.bytes * sizes.pairs + loss.bytes) / 1e6,
                    "paper": paper.get(objective),
                    "paper_over_clip": paper[objective][0] / paper["CLIP"][0] - 1 if objective in paper else None,
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
    print(f"{'B':>6} {'':10} {'TFLOP':>8} {'paper':>6} {'over CLIP':>10} {'paper':>8} {'MB':>8} {'paper':>6}")
    for row in rows:
        theirs = ("", "", "")
        if row["paper"]:
            theirs = (f"{row['paper'][0]:.2f}", f"{row['paper_over_clip']:+.2%}", str(row["paper"][1]))
        print(
            f"{row['batch_size']:6} {row['objective']:10} {row['tflops']:8.3f} {theirs[0]:>6} "
            f"{row['over_clip']:+10.3%} {theirs[1]:>8} {row['megabytes']:8.0f} {theirs[2]:>6}"
        )
    for part, share in model["shares"].items():
        print(f"  of a CLIP step, {part}: {share:+.3%}")
