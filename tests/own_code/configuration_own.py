from transformers import PreTrainedConfig


class OwnConfig(PreTrainedConfig):
    model_type = "own"

    def __init__(
        self,
        vocab_size=96,
        hidden_size=48,
        inner_size=40,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=10,
        **kwargs,
    ):
        self.vocab_size, self.hidden_size, self.inner_size = vocab_size, hidden_size, inner_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.num_key_value_heads, self.head_dim = num_key_value_heads, head_dim
        super().__init__(**kwargs)
