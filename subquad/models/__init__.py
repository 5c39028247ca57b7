"""Hugging Face models made of subquad's layers. Importing this package registers them with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from subquad.models.backbone import SubquadModel as SubquadModel
from subquad.models.classifier import SubquadForSequenceClassification as SubquadForSequenceClassification
from subquad.models.configuration import SubquadConfig as SubquadConfig

AutoConfig.register(SubquadConfig.model_type, SubquadConfig)
AutoModel.register(SubquadConfig, SubquadModel)
AutoModelForSequenceClassification.register(SubquadConfig, SubquadForSequenceClassification)
