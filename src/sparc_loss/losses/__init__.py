"""Training objectives, one per file, each with ClipLoss's constructor arguments."""

from sparc_loss.losses.filip import FilipLoss
from sparc_loss.losses.flair import FlairHeads, FlairLoss
from sparc_loss.losses.gloria import GloriaLoss
from sparc_loss.losses.mgca import MgcaHeads, MgcaLoss
from sparc_loss.losses.pacl import PaclLoss
from sparc_loss.losses.sparc import SparcLoss

__all__ = ["FilipLoss", "FlairHeads", "FlairLoss", "GloriaLoss", "MgcaHeads", "MgcaLoss", "PaclLoss", "SparcLoss"]
