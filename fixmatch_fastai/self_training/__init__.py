"Self-training: a network learns from predictions for unlabelled images, its own or another's; one idea a module"

from fixmatch_fastai.self_training.compare import SupervisedTwin, compare_supervised
from fixmatch_fastai.self_training.meta_pseudo_labels import MetaPseudoLabels
from fixmatch_fastai.self_training.soft_labels import (
    DistillationLoss,
    LogitsMSELoss,
    SoftBCELoss,
    SoftCategoryBlock,
    SoftCrossEntropyLoss,
    SoftFocalLoss,
    soft_accuracy,
)
from fixmatch_fastai.self_training.students import NoisyStudent, add_drop_path, self_distill, semi_weak
from fixmatch_fastai.self_training.table import (
    TableLabels,
    balance_classes,
    predictions,
    pseudo_label,
    read_pseudo_labels,
    with_pseudo_labels,
)
from fixmatch_fastai.self_training.warm_start import (
    inpainting_dls,
    inpainting_learner,
    inpainting_loss,
    load_body,
    rotation_dls,
    show_inpainting,
)

__all__ = [
    'DistillationLoss', 'LogitsMSELoss', 'MetaPseudoLabels', 'NoisyStudent', 'SoftBCELoss', 'SoftCategoryBlock',
    'SoftCrossEntropyLoss', 'SoftFocalLoss', 'SupervisedTwin', 'TableLabels', 'add_drop_path', 'balance_classes',
    'compare_supervised', 'inpainting_dls', 'inpainting_learner', 'inpainting_loss', 'load_body', 'predictions',
    'pseudo_label', 'read_pseudo_labels', 'rotation_dls', 'self_distill', 'semi_weak', 'show_inpainting',
    'soft_accuracy', 'with_pseudo_labels',
]  # fmt: skip
