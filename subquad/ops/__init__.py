"""Shared compute: functions on tensors, which know no module, no config and no mechanism.

In the file of an operation the definition stands first: slow, a few lines, right in float64. The fast form follows with
the same signature, and the tests hold the two together in values and in all gradients.
"""

from subquad.ops.combiner.attention import combiner_attention as combiner_attention
from subquad.ops.combiner.grid import Horizontal as Horizontal
from subquad.ops.combiner.grid import Rowmajor as Rowmajor
from subquad.ops.combiner.grid import Vertical as Vertical
from subquad.ops.combiner.joint_mixture import JointMixture as JointMixture
from subquad.ops.combiner.levels import Logsparse as Logsparse
from subquad.ops.combiner.plans import Fixed as Fixed
from subquad.ops.combiner.summarize import Summarize as Summarize
from subquad.ops.features.attention import linear_attention as linear_attention
from subquad.ops.lsh.attention import lsh_attention as lsh_attention
from subquad.ops.pattern.attention import pattern_attention as pattern_attention
from subquad.ops.pattern.attention import pattern_attention_with_lse as pattern_attention_with_lse
from subquad.ops.topk.attention import topk_attention as topk_attention
