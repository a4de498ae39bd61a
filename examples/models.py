"""Small networks of every family that a user may want to cut, in plain torch.

Each factory ``name(...)`` builds a freshly initialised model, and ``name_example(batch, ...)`` an input for it. Both
draw from torch's global generator: call ``torch.manual_seed`` first, or they differ from run to run.
Every model can be traced by ``torch.fx`` with its submodules as leaves (so that it can be cut by their names) and
exported by ``torch.export`` with a dynamic batch, in training and in evaluation.

============== ============================================= ==========================================================
factory        input                                         submodules, front to head
============== ============================================= ==========================================================
resnet18       [B, 3, 32, 32]                                conv1 bn1 relu layer1..layer4 avgpool dropout fc
small_resnet   [B, channels, size, size], size 8 or more     the same
ecg_cnn        [B, 1, 128]                                   stem block1..block3 head
transformer    [B, tokens, features]                         embed (positions) layers fc
lstm           [B, tokens, features]                         embed recurrent fc
unet           [B, 1, size, size], size a multiple of 4      stem encode1 encode2 bottom up2 decode2 up1 decode1 head
depthwise      [B, 3, 32, 32]                                stem block1..block4 head
llama_layers   [B, tokens, width], hidden states             rotary layers
mlp            [B, 784]                                      fc1 relu1 fc2 relu2 fc3
small_cnn      [B, 1, 28, 28]                                stem body head
============== ============================================= ==========================================================

Shapes: ``B`` batch, ``C`` channels, ``H`` height, ``W`` width, ``L`` samples of a signal, ``T`` tokens or time steps,
``F`` features of a token, ``D`` model width, ``K`` classes.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers.models.llama.configuration_llama import LlamaConfig

__all__ = [
    "depthwise",
    "depthwise_example",
    "ecg_cnn",
    "ecg_cnn_example",
    "llama_layers",
    "llama_layers_example",
    "lstm",
    "lstm_example",
    "mlp",
    "mlp_example",
    "resnet18",
    "resnet18_example",
    "small_cnn",
    "small_cnn_example",
    "small_resnet",
    "small_resnet_example",
    "transformer",
    "transformer_example",
    "unet",
    "unet_example",
]

_ATTENTION_HEADS: Final = 4  # divides every model width used here
_LLAMA_KEY_VALUE_HEADS: Final = 2  # fewer than query heads: grouped-query attention, as Llama 3 has it


# --- Residual networks (He et al. 2015, "Deep Residual Learning for Image Recognition", section 4.2) ------------------


def resnet18(classes: int = 10, dropout: float = 0.0) -> nn.Module:
    """ResNet-18 with the stem for CIFAR: a 3x3 convolution of stride 1 and no max-pooling.

    Parameters carry torchvision's names. With ``dropout`` above 0, every block and ``fc`` drop that share.
    """
    return _ResNet(channels=3, width=64, blocks=2, strides=(1, 2, 2, 2), classes=classes, dropout=dropout)


def resnet18_example(batch: int) -> Tensor:
    """Images [batch, 3, 32, 32]."""
    return torch.randn(batch, 3, 32, 32)


def small_resnet(classes: int = 10, width: int = 8, dropout: float = 0.0, channels: int = 1) -> nn.Module:
    """The same family with one block a stage, for tests: about 78,000 parameters at width 8."""
    # The last stage keeps its size, so that 8x8 images end as 2x2 and batch-norm also trains on a batch of one.
    return _ResNet(channels, width, blocks=1, strides=(1, 2, 2, 1), classes=classes, dropout=dropout)


def small_resnet_example(batch: int, size: int = 8, channels: int = 1) -> Tensor:
    """Images [batch, channels, size, size]."""
    return torch.randn(batch, channels, size, size)


class _BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.dropout = _dropout(dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = self.dropout(self.relu(self.bn1(self.conv1(x_BCHW))))
        y_BCHW = self.bn2(self.conv2(y_BCHW))
        out_BCHW: Tensor = self.relu(y_BCHW + self.downsample(x_BCHW))
        return out_BCHW


class _ResNet(nn.Module):
    def __init__(
        self, channels: int, width: int, blocks: int, strides: tuple[int, int, int, int], classes: int, dropout: float
    ) -> None:
        super().__init__()

        def stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            rest = (_BasicBlock(outputs, outputs, 1, dropout) for _ in range(blocks - 1))
            return nn.Sequential(_BasicBlock(inputs, outputs, stride, dropout), *rest)

        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.layer1 = stage(width, width, strides[0])
        self.layer2 = stage(width, 2 * width, strides[1])
        self.layer3 = stage(2 * width, 4 * width, strides[2])
        self.layer4 = stage(4 * width, 8 * width, strides[3])
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = _dropout(dropout)
        self.fc = nn.Linear(8 * width, classes)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x_BCHW = self.relu(self.bn1(self.conv1(images_BCHW)))
        x_BCHW = self.layer4(self.layer3(self.layer2(self.layer1(x_BCHW))))
        x_BC = torch.flatten(self.avgpool(x_BCHW), 1)
        logits_BK: Tensor = self.fc(self.dropout(x_BC))
        return logits_BK


# --- Signals and sequences --------------------------------------------------------------------------------------------


def ecg_cnn(classes: int = 5) -> nn.Module:
    """A 1-D network for single heartbeats, such as the five classes of MIT-BIH; its blocks hold 461,000 parameters."""
    return nn.Sequential(
        OrderedDict(
            stem=nn.Sequential(nn.Conv1d(1, 32, 7, padding=3, bias=False), nn.BatchNorm1d(32), nn.ReLU()),
            block1=_ecg_block(32, 64),
            block2=_ecg_block(64, 128),
            block3=_ecg_block(128, 192),
            head=nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(192, classes)),
        )
    )


def ecg_cnn_example(batch: int) -> Tensor:
    """Beats [batch, 1, 128]."""
    return torch.randn(batch, 1, 128)


def _ecg_block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(inputs, outputs, 5, padding=2, bias=False),
        nn.BatchNorm1d(outputs),
        nn.ReLU(),
        nn.Conv1d(outputs, outputs, 5, padding=2, bias=False),
        nn.BatchNorm1d(outputs),
        nn.ReLU(),
        nn.MaxPool1d(2),
    )


def transformer(
    classes: int = 10,
    tokens: int = 16,
    features: int = 32,
    d_model: int = 64,
    layers: int = 2,
    dropout: float = 0.1,
) -> nn.Module:
    """A Transformer encoder with learned positions and mean pooling; ``d_model`` is a multiple of 4 (its heads)."""
    return _Transformer(classes, tokens, features, d_model, layers, dropout)


def transformer_example(batch: int, tokens: int = 16, features: int = 32) -> Tensor:
    """Token features [batch, tokens, features]."""
    return torch.randn(batch, tokens, features)


class _Transformer(nn.Module):
    def __init__(self, classes: int, tokens: int, features: int, d_model: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Linear(features, d_model)
        self.positions = nn.Parameter(torch.randn(tokens, d_model) * 0.02)
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(d_model, _ATTENTION_HEADS, 4 * d_model, dropout, batch_first=True)
                for _ in range(layers)
            )
        )
        self.fc = nn.Linear(d_model, classes)

    def forward(self, tokens_BTF: Tensor) -> Tensor:
        hidden_BTD = self.layers(self.embed(tokens_BTF) + self.positions)
        logits_BK: Tensor = self.fc(hidden_BTD.mean(dim=1))
        return logits_BK


def lstm(classes: int = 5, features: int = 8, hidden: int = 64, dropout: float = 0.1) -> nn.Module:
    """Two LSTM layers with dropout between them; the class is read from the last step."""
    return _LSTMClassifier(classes, features, hidden, dropout)


def lstm_example(batch: int, tokens: int = 20, features: int = 8) -> Tensor:
    """Sequences [batch, tokens, features]."""
    return torch.randn(batch, tokens, features)


class _LSTMOutput(nn.Module):
    """An LSTM that returns its outputs alone: one tensor is what a cut after it carries."""

    def __init__(self, inputs: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.lstm = nn.LSTM(inputs, hidden, num_layers=2, batch_first=True, dropout=dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        output_BTD: Tensor = self.lstm(x_BTD)[0]
        return output_BTD


class _LSTMClassifier(nn.Module):
    def __init__(self, classes: int, features: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Linear(features, hidden)
        self.recurrent = _LSTMOutput(hidden, hidden, dropout)
        self.fc = nn.Linear(hidden, classes)

    def forward(self, sequence_BTF: Tensor) -> Tensor:
        output_BTD = self.recurrent(self.embed(sequence_BTF))
        logits_BK: Tensor = self.fc(output_BTD[:, -1])
        return logits_BK


def llama_layers(
    layers: int = 4, width: int = 64, attention: Literal["sdpa", "eager"] = "sdpa", dropout: float = 0.0
) -> nn.Module:
    """Randomly initialised decoder layers of Hugging Face's Llama: hidden states in, hidden states out, both [B, T, D].

    Needs ``transformers``. Positions are rotary and attention is causal, whichever implementation computes it;
    ``dropout`` is that of the attention weights. ``width`` is a multiple of 8 (four heads of an even size).
    """
    # Here, not at the top: the other models need torch alone.
    from transformers.models.llama.configuration_llama import LlamaConfig  # noqa: PLC0415

    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=_ATTENTION_HEADS,
        num_key_value_heads=_LLAMA_KEY_VALUE_HEADS,
        max_position_embeddings=128,
        attention_dropout=dropout,
        attn_implementation=attention,  # type: ignore[call-arg]  # taken by the base class, unseen by type checkers
    )
    return _LlamaLayers(config, masked=attention == "eager")


def llama_layers_example(batch: int, tokens: int = 12, width: int = 64) -> Tensor:
    """Hidden states [batch, tokens, width]."""
    return torch.randn(batch, tokens, width)


class _Rotary(nn.Module):
    """Cosines and sines of the positions 0..T-1, and the causal mask where the attention needs one spelled out."""

    def __init__(self, config: LlamaConfig, *, masked: bool) -> None:
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # noqa: PLC0415  (as its factory)

        super().__init__()
        self.embedding = LlamaRotaryEmbedding(config)
        self.masked = masked

    def forward(self, hidden_BTD: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        tokens = hidden_BTD.shape[1]
        positions_1T = torch.arange(tokens, device=hidden_BTD.device).unsqueeze(0)
        cos_sin: tuple[Tensor, Tensor] = self.embedding(hidden_BTD, positions_1T)
        if not self.masked:
            return cos_sin, None
        mask_TT = torch.full((tokens, tokens), float("-inf"), device=hidden_BTD.device, dtype=hidden_BTD.dtype)
        return cos_sin, mask_TT.triu(1)


class _LlamaLayers(nn.Module):
    def __init__(self, config: LlamaConfig, *, masked: bool) -> None:
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer  # noqa: PLC0415  (as its factory)

        super().__init__()
        self.rotary = _Rotary(config, masked=masked)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers))

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        rotary: Any = self.rotary(hidden_BTD)
        for layer in self.layers:
            hidden_BTD = layer(hidden_BTD, position_embeddings=rotary[0], attention_mask=rotary[1])
        return hidden_BTD


# --- Images -----------------------------------------------------------------------------------------------------------


def unet(classes: int = 2, width: int = 16) -> nn.Module:
    """A U-Net (Ronneberger et al. 2015) of two levels; its skips stay between ``stem`` and ``head``."""
    return _UNet(classes, width)


def unet_example(batch: int, size: int = 32) -> Tensor:
    """Images [batch, 1, size, size]."""
    return torch.randn(batch, 1, size, size)


class _UNet(nn.Module):
    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.stem = _conv(1, width)
        self.encode1 = _conv(width, width)
        self.encode2 = _conv(width, 2 * width)
        self.pool = nn.MaxPool2d(2)
        self.bottom = _conv(2 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.decode2 = _conv(4 * width, 2 * width)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.decode1 = _conv(2 * width, width)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        skip1_BCHW = self.encode1(self.stem(images_BCHW))
        skip2_BCHW = self.encode2(self.pool(skip1_BCHW))
        x_BCHW = self.bottom(self.pool(skip2_BCHW))
        x_BCHW = self.decode2(torch.cat([skip2_BCHW, self.up2(x_BCHW)], dim=1))
        x_BCHW = self.decode1(torch.cat([skip1_BCHW, self.up1(x_BCHW)], dim=1))
        logits_BKHW: Tensor = self.head(x_BCHW)
        return logits_BKHW


def depthwise(classes: int = 10, width: int = 32, *, batch_norm: bool = False) -> nn.Module:
    """A depth-wise separable network (MobileNet, Howard et al. 2017).

    GroupNorm and SiLU by default (nothing depends on the rest of the batch); batch-norm and ReLU6 when asked for.
    ``width`` is a multiple of 8, the number of groups.
    """
    return nn.Sequential(
        OrderedDict(
            stem=nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), *_normed(width, batch_norm=batch_norm)),
            block1=_separable(width, 2 * width, 1, batch_norm=batch_norm),
            block2=_separable(2 * width, 4 * width, 2, batch_norm=batch_norm),
            block3=_separable(4 * width, 4 * width, 1, batch_norm=batch_norm),
            block4=_separable(4 * width, 8 * width, 2, batch_norm=batch_norm),
            head=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, classes)),
        )
    )


def depthwise_example(batch: int) -> Tensor:
    """Images [batch, 3, 32, 32]."""
    return torch.randn(batch, 3, 32, 32)


def _separable(inputs: int, outputs: int, stride: int, *, batch_norm: bool) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, stride, padding=1, groups=inputs, bias=False),
        *_normed(inputs, batch_norm=batch_norm),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        *_normed(outputs, batch_norm=batch_norm),
    )


def _normed(channels: int, *, batch_norm: bool) -> tuple[nn.Module, nn.Module]:
    if batch_norm:
        return nn.BatchNorm2d(channels), nn.ReLU6()
    return nn.GroupNorm(8, channels), nn.SiLU()


def mlp(classes: int = 10) -> nn.Module:
    """The perceptron 784-256-256-``classes`` on flat 28x28 images."""
    return nn.Sequential(
        OrderedDict(
            fc1=nn.Linear(784, 256),
            relu1=nn.ReLU(),
            fc2=nn.Linear(256, 256),
            relu2=nn.ReLU(),
            fc3=nn.Linear(256, classes),
        )
    )


def mlp_example(batch: int) -> Tensor:
    """Flat images [batch, 784]."""
    return torch.randn(batch, 784)


def small_cnn(classes: int = 10) -> nn.Module:
    """Two convolutions with max-pooling and two linear layers, on 28x28 images; neither normalisation nor dropout."""
    return nn.Sequential(
        OrderedDict(
            stem=nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            body=nn.Sequential(
                nn.Conv2d(16, 32, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Flatten(),
                nn.Linear(1568, 128),
                nn.ReLU(),
            ),
            head=nn.Linear(128, classes),
        )
    )


def small_cnn_example(batch: int) -> Tensor:
    """Images [batch, 1, 28, 28]."""
    return torch.randn(batch, 1, 28, 28)


def _conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


def _dropout(share: float) -> nn.Module:
    return nn.Dropout(share) if share else nn.Identity()
