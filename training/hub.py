"""Names of models on the Hugging Face hub."""

import re

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
