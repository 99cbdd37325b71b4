"""Reads and writes Hugging Face folders: config.json and safetensors, one file or shards with an index."""

from .read import Stored as Stored
from .read import load as load
from .read import read_config as read_config
from .write import check_target as check_target
from .write import save as save
