"""The token mixers: one file, one mechanism. Importing this package enters all of them in the registry."""

from subquad.mechanisms import bigbird as bigbird
from subquad.mechanisms import combiner as combiner
from subquad.mechanisms import cosformer as cosformer
from subquad.mechanisms import delta as delta
from subquad.mechanisms import full as full
from subquad.mechanisms import gated_linear as gated_linear
from subquad.mechanisms import gmlp as gmlp
from subquad.mechanisms import linear as linear
from subquad.mechanisms import linformer as linformer
from subquad.mechanisms import local as local
from subquad.mechanisms import logsparse as logsparse
from subquad.mechanisms import longformer as longformer
from subquad.mechanisms import mlp_mixer as mlp_mixer
from subquad.mechanisms import ngram as ngram
from subquad.mechanisms import nystromformer as nystromformer
from subquad.mechanisms import performer as performer
from subquad.mechanisms import r_transformer as r_transformer
from subquad.mechanisms import retention as retention
from subquad.mechanisms import routing as routing
from subquad.mechanisms import sinkhorn as sinkhorn
from subquad.mechanisms import sparse_transformer as sparse_transformer
from subquad.mechanisms import star as star
from subquad.mechanisms import streaming as streaming
from subquad.mechanisms import synthesizer as synthesizer
from subquad.mechanisms import topk as topk
