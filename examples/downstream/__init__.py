"""What backbones are good for: detection and captioning by a frozen backbone, like for like."""
