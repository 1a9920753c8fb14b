"""The `objective` of a config: which recipe trains the student, and how much each of its losses counts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator
from pydantic_core import PydanticCustomError

from kpu_fast.config_strict import Strict, changed, impossible


class KPUConfig(Strict):
    """L_s2t + L_t2s + rec_weight L_rec, each x_weight Lcos(x) + cos_weight Lcos(V) + l1_weight SmoothL1_beta(V)."""

    recipe: Literal["kpu"] = "kpu"
    t2s: bool = True  # L_t2s: in the common space
    rec: bool = True  # L_rec: from there back to the teacher's; needs t2s
    rec_weight: float = Field(default=1.0, gt=0.0)  # the paper's lambda
    x_weight: float = Field(default=1.0, ge=0.0)
    cos_weight: float = Field(default=0.9, ge=0.0)
    l1_weight: float = Field(default=0.1, ge=0.0)
    beta: float = Field(default=1.0, ge=0.0)
    centre: bool = True  # where t2s is on, the heads subtract a running mean from what comes in
    balance: Literal["equal", "famo", "teacher_drop"] = "equal"  # how much each teacher's loss counts
    standardize: Literal["none", "meanstd", "phi_s"] = "none"  # teachers' features, before they are targets
    standardize_batches: int = Field(default=50, ge=1)  # of each teacher, read before step 1 for the statistics

    @field_validator("recipe", mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        if value != "kpu":
            raise PydanticCustomError("recipe", "it should be 'kpu' or 'gkd'")
        return value

    @model_validator(mode="after")
    def _batches_need_statistics(self) -> KPUConfig:
        if self.standardize == "none" and changed(self, "standardize_batches"):
            raise impossible('standardize_batches: belongs to standardize "meanstd" or "phi_s"; found "none"')
        return self

    @model_validator(mode="after")
    def _some_loss_counts(self) -> KPUConfig:
        if not (self.x_weight or self.cos_weight or self.l1_weight):
            raise impossible(
                "x_weight: found 0 for x_weight, cos_weight and l1_weight, which trains nothing; set one above 0"
            )
        return self

    @model_validator(mode="after")
    def _rec_fits(self) -> KPUConfig:
        if self.rec and not self.t2s:
            raise impossible(
                "rec: reconstruction starts from the common space; set objective.t2s to true or rec to false"
            )
        if not self.rec and changed(self, "rec_weight"):
            raise impossible("rec_weight: belongs to rec true; found false")
        return self


class GKDConfig(Strict):
    """token_weight L_token + feature_weight L_feature + patch_weight L_patch, of a ViT that is trained as a whole."""

    recipe: Literal["gkd"]
    query: bool = True  # the student's tokens look for the teacher's (QSD); false: each head is a projection alone
    token_weight: float = Field(default=1.0, ge=0.0)  # of x
    feature_weight: float = Field(default=1.0, ge=0.0)  # of x and the map
    patch_weight: float = Field(default=1.0, ge=0.0)  # of the map where the student does not see all of the image
    mask_images: float = Field(default=0.5, gt=0.0, le=1.0)  # share of a batch that has patches masked
    mask_patches: float = Field(default=0.5, gt=0.0, lt=1.0)  # share of the patches in such an image
    balance: Literal["equal", "teacher_drop"] = "equal"  # how much each teacher's loss counts

    @model_validator(mode="after")
    def _consistent(self) -> GKDConfig:
        if not (self.token_weight or self.feature_weight or self.patch_weight):
            raise impossible("token_weight: found 0 for all three weights, which trains nothing; set one above 0")
        if not self.patch_weight and (others := changed(self, "mask_images", "mask_patches")):
            raise impossible(f"{others[0]}: belongs to patch_weight above 0; found 0")
        return self

    def masked(self, images: int, patches: int) -> tuple[int, int]:
        """How many images of a batch are seen with patches masked, and how many of its patches each then lacks."""
        return int(images * self.mask_images), int(patches * self.mask_patches)


def _recipe(value: Any) -> str:
    found = value.get("recipe") if isinstance(value, dict) else getattr(value, "recipe", None)
    return "gkd" if found == "gkd" else "kpu"  # which also says what is wrong with any other


ObjectiveBlock = Annotated[Annotated[KPUConfig, Tag("kpu")] | Annotated[GKDConfig, Tag("gkd")], Discriminator(_recipe)]
