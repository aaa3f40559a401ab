"""Recipes by name: functions without arguments that return an Experiment."""

from collections.abc import Callable
from typing import Any

from zoo.train.experiment import Experiment
from zoo.train.recipes import gpt2, gpt3
from zoo.train.recipes.autoencoder import autoencoder_digits
from zoo.train.recipes.bart import bart_base, bart_nano
from zoo.train.recipes.bert import bert_base, bert_nano
from zoo.train.recipes.ddpm import ddpm_cifar10, ddpm_fashion
from zoo.train.recipes.ddpm_digits import ddpm_digits
from zoo.train.recipes.gpt_nano import gpt_nano
from zoo.train.recipes.latent_diffusion import dit_xl_2, latent_digits
from zoo.train.recipes.llama import llama_3_2_1b, llama_nano
from zoo.train.recipes.t5 import t5_base, t5_nano
from zoo.train.recipes.text_to_image import text_to_digits, text_to_emoji
from zoo.train.recipes.transformer import transformer_base, transformer_big, transformer_nano
from zoo.train.recipes.vit import vit_b16, vit_digits, vit_s16
from zoo.train.recipes.xlnet import xlnet_base, xlnet_nano

RECIPES: dict[str, Callable[[], Experiment[Any, Any, Any, Any]]] = {
    "gpt-nano": gpt_nano,
    "ddpm-digits": ddpm_digits,
    "ddpm-fashion": ddpm_fashion,
    "ddpm-cifar10": ddpm_cifar10,
    "autoencoder-digits": autoencoder_digits,
    "latent-digits": latent_digits,
    "dit-xl-2": dit_xl_2,
    "text-to-digits": text_to_digits,
    "text-to-emoji": text_to_emoji,
    "vit-digits": vit_digits,
    "vit-s16": vit_s16,
    "vit-b16": vit_b16,
    "bert-nano": bert_nano,
    "bert-base": bert_base,
    "t5-nano": t5_nano,
    "t5-base": t5_base,
    "bart-nano": bart_nano,
    "bart-base": bart_base,
    "transformer-nano": transformer_nano,
    "transformer-base": transformer_base,
    "transformer-big": transformer_big,
    "llama-nano": llama_nano,
    "llama-3.2-1b": llama_3_2_1b,
    "xlnet-nano": xlnet_nano,
    "xlnet-base": xlnet_base,
    **gpt2.RECIPES,
    **gpt3.RECIPES,
}
