"""All models of the zoo: importing this module fills `CASES`."""

from __future__ import annotations

from . import layer_models as layer_models
from . import linen_models as linen_models
from . import nnx_models as nnx_models
from . import sequence_models as sequence_models
from .models import CASES as CASES
