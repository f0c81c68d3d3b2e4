"""What ComfyUI makes of a Wan file, as its stock nodes do. Run by ComfyUI's Python, from test_wan_demo.py.

python comfyui_worker.py TRANSFORMER VAE GIVEN RESULT, with ComfyUI's folder as PYTHONPATH
"""

import importlib
import sys

import comfy.cli_args
import torch
from safetensors.torch import load_file, save_file

comfy.cli_args.args.cpu = True  # before the imports below


@torch.no_grad()
def main(transformer: str, vae: str, given: str, result: str) -> None:
    import comfy.sd
    import comfy.utils

    importlib.import_module("comfy_extras.nodes_post_processing")  # imports nodes_latent, which imports it
    from comfy_extras.nodes_latent import LatentCutToBatch

    asked = load_file(given)
    model = comfy.sd.load_diffusion_model(transformer, model_options={"dtype": torch.float32}).model
    velocity = model.diffusion_model(asked["latent"], timestep=asked["timestep"], context=asked["tokens"])
    frames = LatentCutToBatch.execute({"samples": model.process_latent_out(asked["clean"])}, "t", 1)[0]
    pictures = comfy.sd.VAE(sd=comfy.utils.load_torch_file(vae)).decode(frames["samples"])
    told = {"velocity": velocity.contiguous(), "pictures": pictures.contiguous()}
    save_file(told, result, metadata={"class": type(model).__name__})


main(*sys.argv[1:])
