"""The operators of Block Attention Residuals; importing this module registers all of them.

A block of S sites over n completed sources is one ``phase1`` and S ``phase2``, and every source
passes through ``complete`` once, when its last branch is known. ``complete.py``, ``phase1.py`` and
``phase2.py`` hold the formulas. When a block is over, its statistics and logits are best taken
apart by ``unbind`` and ``split``, whose gradients are put together again by a single copy.
"""

from attnres_compile.kernels.complete import complete as complete
from attnres_compile.kernels.phase1 import phase1 as phase1
from attnres_compile.kernels.phase2 import phase2 as phase2
