"""The old place of what `prompts`, `drawing` and `validation` hold now."""

from .drawing import drawing_quality as drawing_quality
from .prompts import SPLITS as SPLITS
from .prompts import STICKER_STYLES as STICKER_STYLES
from .prompts import embedded_prompts as embedded_prompts
from .prompts import embedded_reference as embedded_reference
from .prompts import of_classes as of_classes
from .prompts import reference_of as reference_of
from .validation import not_measurable as not_measurable
from .validation import validation_loss as validation_loss
