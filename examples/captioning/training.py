"""Training of the decoder on the captions of a CSV; the backbone is frozen."""

import torch

from sparc_loss.evaluation.dataset import EvaluationData
from sparc_loss.evaluation.faithfulness import caption_words

from ..downstream.backbone import Backbone
from ..downstream.embedded_batches import embedded_batches
from ..downstream.optimisation import Optimisation, training_order
from .decoder import Captioner
from .vocabulary import Vocabulary

# Words of the longest caption that is learnt and written.
MAXIMAL_LENGTH = 50


def train_captioner(
    backbone: Backbone, data: EvaluationData, *, steps: int, batch_size: int, lr: float, seed: int, workers: int
) -> tuple[Captioner, Vocabulary]:
    """Train a decoder; in each step each image comes with one of its captions."""
    torch.manual_seed(seed)
    vocabulary = Vocabulary(data.captions)
    length = min(MAXIMAL_LENGTH, max(len(caption_words(caption)) for caption in data.captions))
    captioner = Captioner(backbone.width, len(vocabulary), length).to(backbone.device)
    optimisation = Optimisation({captioner: lr}, steps)
    captions_of = data.captions_of()
    generator = torch.Generator().manual_seed(seed)
    order = training_order(len(data.images), steps, batch_size, seed)
    for batch in embedded_batches(backbone, data.images, order, batch_size, workers):
        chosen = [
            captions_of[image][int(torch.randint(len(captions_of[image]), (), generator=generator))]
            for image in batch.indices
        ]
        ids = vocabulary.encode([data.captions[caption] for caption in chosen], length).to(backbone.device)
        optimisation.step(captioner(batch.patches, ids))
    return captioner.eval(), vocabulary
