"The public names of fixmatch_fastai"
from fixmatch_fastai.augment import Cutout, FixMatchTransform, strong_augment, weak_augment
from fixmatch_fastai.callback import FixMatch
from fixmatch_fastai.data import UnlabeledDL, WeakTransform, digits_path, split_labeled
from fixmatch_fastai.policy import (
    UDA,
    AdaMatch,
    Dash,
    DebiasMatch,
    DistributionAlignment,
    FixedThreshold,
    FlexMatch,
    FreeMatch,
    Policy,
    PseudoLabels,
    SemiBatch,
    SoftMatch,
)

# `DataLoaders.unlabeled_dl` and `DataLoaders.repeat_train` come with `fixmatch_fastai.data`
__all__ = ['AdaMatch', 'Cutout', 'Dash', 'DebiasMatch', 'DistributionAlignment', 'FixMatch', 'FixMatchTransform', 'FixedThreshold', 'FlexMatch',
           'FreeMatch', 'Policy', 'PseudoLabels', 'SemiBatch', 'SoftMatch', 'UDA', 'UnlabeledDL', 'WeakTransform', 'digits_path', 'split_labeled',
           'strong_augment', 'weak_augment']
