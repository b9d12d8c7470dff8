"""SPARC in a training loop of one's own: scikit-learn's handwritten digits, a small ViT, a few steps on the CPU."""

import math

import open_clip
import torch
from PIL import Image
from sklearn.datasets import load_digits

from sparc_loss import SparcLoss, surface_embeddings

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
STEPS, BATCH_SIZE = 5, 8

model, preprocess, _ = open_clip.create_model_and_transforms("ViT-S-32")
tokenizer = open_clip.get_tokenizer("ViT-S-32")
surface_embeddings(model, tokenizer)
loss = SparcLoss()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

digits = load_digits()
model.train()
for step in range(STEPS):
    batch = range(step * BATCH_SIZE, (step + 1) * BATCH_SIZE)
    images = torch.stack([preprocess(Image.fromarray((digits.images[i] * 15).astype("uint8"))) for i in batch])
    texts = tokenizer([f"the digit {NAMES[digits.target[i]]}, written by hand" for i in batch])

    terms = loss(**model(images, texts), output_dict=True)
    optimizer.zero_grad()
    sum(terms.values()).backward()
    optimizer.step()
    model.logit_scale.data.clamp_(0, math.log(100))
    print(f"step {step}:", *(f"{name} {term.item():.3f}" for name, term in terms.items()))
