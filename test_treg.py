# SPDX-License-Identifier: MIT
"""Tests of treg.py: python -m pytest -q test_treg.py

The heart is derivations done by hand, in the docstring, and asserted to 1e-10 in float64 against autograd.
"""
import argparse
import copy
import gzip
import hashlib
import importlib.util
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import treg  # noqa: E402
