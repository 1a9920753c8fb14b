"""The models: the student, its parts, and what flows between them."""

from kpu_fast.models.adapter import Adapter
from kpu_fast.models.features import Features, FeatureSpec
from kpu_fast.models.projector import FeatureHeads, Projector
from kpu_fast.models.student import Student
from kpu_fast.models.vit import ViT

__all__ = ["Adapter", "FeatureHeads", "FeatureSpec", "Features", "Projector", "Student", "ViT"]
