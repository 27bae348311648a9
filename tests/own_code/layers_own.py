import torch
from torch import nn


class OwnAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx, self.head_dim = layer_idx, config.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.q = nn.Linear(config.hidden_size, config.num_attention_heads * config.head_dim)
        self.k = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim)
        self.v = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim)
        self.o = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size)

    def forward(self, hidden_states):
        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        q, k, v = (f(hidden_states).view(shape).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = k.repeat_interleave(self.groups, 1), v.repeat_interleave(self.groups, 1)
        scores = q @ k.transpose(2, 3) / self.head_dim**0.5
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        return self.o((scores @ v).transpose(1, 2).flatten(2))


class OwnMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up, self.down = (
            nn.Linear(config.hidden_size, config.inner_size),
            nn.Linear(config.inner_size, config.hidden_size),
        )

    def forward(self, hidden_states):
        return self.down(nn.functional.gelu(self.up(hidden_states)))


class OwnLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.attn, self.ffn = OwnAttention(config, layer_idx), OwnMLP(config)
        self.norm1, self.norm2 = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)

    def forward(self, hidden_states):
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states))
        return hidden_states + self.ffn(self.norm2(hidden_states))
