"""The smallest models for the mixins of transformers' source distribution; run.py puts this file among them."""

import unittest

import torch
import transformers
from transformers.testing_utils import torch_device

from .test_modeling_common import ModelTesterMixin
from .test_training_mixin import TrainingTesterMixin

HEADS = ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


class Tester:
    """What the mixins ask of a model: sizes, a config, inputs."""

    def __init__(self, family, **own):
        self.family, self.own = family, own
        self.causal_lm_class = getattr(transformers, f"{family}ForCausalLM")
        self.batch_size, self.seq_length, self.is_training = 5, 7, True
        self.hidden_size, self.num_attention_heads, self.num_hidden_layers = 32, 4, 2

    def get_config(self):
        sizes = dict(
            vocab_size=99, hidden_size=self.hidden_size, num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2, num_hidden_layers=self.num_hidden_layers, intermediate_size=37,
            max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        return getattr(transformers, f"{self.family}Config")(**sizes, **self.own)

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(3, 99, (self.batch_size, self.seq_length), device=torch_device)
        return self.get_config(), dict(input_ids=ids, attention_mask=torch.ones_like(ids))


class Common(ModelTesterMixin, TrainingTesterMixin):
    model_tester = None
    test_generation_tester_mixin_inheritance = None  # it demands a mixin that the source distribution lacks

    def setUp(self):
        self.model_tester = Tester(self.family, **self.own)
        self.all_model_classes = tuple(getattr(transformers, self.family + head) for head in HEADS)


class MistralTest(Common, unittest.TestCase):
    family, own = "Mistral", dict(sliding_window=4)


class LlamaTest(Common, unittest.TestCase):
    family, own = "Llama", {}
