"""Hugging Face models made of subquad's mixers. Importing this package registers them with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from subquad.models.backbone import SubquadModel as SubquadModel
from subquad.models.cache import SubquadCache as SubquadCache
from subquad.models.causal_lm import SubquadForCausalLM as SubquadForCausalLM
from subquad.models.classifier import SubquadForSequenceClassification as SubquadForSequenceClassification
from subquad.models.configuration import SubquadConfig as SubquadConfig
from subquad.models.masked_lm import SubquadForMaskedLM as SubquadForMaskedLM
from subquad.models.pair_classifier import SubquadForPairClassification as SubquadForPairClassification
from subquad.models.sampling import Sampling as Sampling
from subquad.models.seq2seq_lm import SubquadForSeq2SeqLM as SubquadForSeq2SeqLM
from subquad.models.streaming import StreamingGenerator as StreamingGenerator
from subquad.models.streaming import StreamSnapshot as StreamSnapshot

AutoConfig.register(SubquadConfig.model_type, SubquadConfig)
AutoModel.register(SubquadConfig, SubquadModel)
AutoModelForSequenceClassification.register(SubquadConfig, SubquadForSequenceClassification)
AutoModelForMaskedLM.register(SubquadConfig, SubquadForMaskedLM)
AutoModelForCausalLM.register(SubquadConfig, SubquadForCausalLM)
AutoModelForSeq2SeqLM.register(SubquadConfig, SubquadForSeq2SeqLM)
