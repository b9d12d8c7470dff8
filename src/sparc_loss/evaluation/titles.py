"""What the figures are called in tables."""

TITLES = {
    "image_to_text_R@1": "retrieval R@1, image to text",
    "image_to_text_R@5": "retrieval R@5, image to text",
    "image_to_text_R@10": "retrieval R@10, image to text",
    "text_to_image_R@1": "retrieval R@1, text to image",
    "text_to_image_R@5": "retrieval R@5, text to image",
    "text_to_image_R@10": "retrieval R@10, text to image",
    "k_precision": "K-Precision",
    "k_precision_of_nouns_and_adjectives": "K-Precision, nouns and adjectives",
    "hard_negative_accuracy": "hard negatives",
    "zero_shot_top1": "zero-shot classification, top 1",
    "zero_shot_top5": "zero-shot classification, top 5",
    "phrase_pointing": "pointing, phrases",
    "phrase_tokens_pointing": "pointing, phrases as mean of tokens",
    "word_pointing": "pointing, words of captions",
    "mean_iou_of_objects": "mIoU, pixels of objects only",
    "mean_iou": "mIoU, all pixels, no background",
    "mean_iou_with_background": "mIoU with background",
}

# Where a suite's protocol says what the longer title would.
_OF_SUITES = {
    "mean_iou": "mIoU",
    "hard_negative_accuracy": "accuracy",
    "hard_negative_accuracy_of_groups": "accuracy, mean over groups",
}


def suite_title(figure: str) -> str:
    """Of a suite's figure, such as "add_att/hard_negative_accuracy"."""
    part, _, measure = figure.rpartition("/")
    title = _OF_SUITES.get(measure) or TITLES[measure]
    return f"{part}, {title}" if part else title
