"""What a type checker refuses: mypy checks this file and reports an ignore that it does not need; nothing runs it."""

from contrastive_exudate_loss import CombinedExudateLoss, PatchDensityContrastLoss, PatchEdgeContrastLoss, Pull


def refused() -> None:
    PatchDensityContrastLoss(contrast="supcon")  # type: ignore[arg-type]
    PatchDensityContrastLoss(select="some")  # type: ignore[arg-type]
    PatchEdgeContrastLoss(contrast="supcon")  # type: ignore[arg-type]
    PatchEdgeContrastLoss(footprint="disk")  # type: ignore[arg-type]
    PatchEdgeContrastLoss(scope="batch")  # type: ignore[arg-type]
    CombinedExudateLoss(beta="0.1")  # type: ignore[arg-type]
    CombinedExudateLoss(classes=3)  # type: ignore[arg-type]
    Pull(1.0, 300)  # type: ignore[call-arg]


def accepted() -> None:
    PatchDensityContrastLoss(contrast="sup_con", select=3)
    PatchEdgeContrastLoss(footprint="cross", scope="image", inner_radius=(1, 2), density_threshold=0.3)
    CombinedExudateLoss(beta=Pull(1.0, warm_up=300), classes=range(1, 5))
