"""python -m grounded_diffusion.export"""

import sys

from grounded_diffusion.export.cli import main

sys.exit(main())
