"""
Agents on the Hugging Face Hub: :func:`push_to_hub`, :func:`load_from_hub`, :func:`download_from_hub`.

Needs ``pip install "sb3-cyborg[hub]"``, and to push a run the extra ``train`` as well.
"""

from sb3_cyborg.hub.transfer import download_from_hub, load_from_hub, push_to_hub

__all__ = ["download_from_hub", "load_from_hub", "push_to_hub"]
