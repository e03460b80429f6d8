"""cratescope: can the neurons of a language model be understood, and does a white-box architecture help?"""

__version__ = "0.1.0"
