"""Drawing what was asked for: a request, a pipeline that is opened for it, and the files that it becomes.

    from diffusion_accel.generation.drawing import draw
    from diffusion_accel.generation.loading import open_pipeline
    from diffusion_accel.generation.request import Request

    pipe = open_pipeline("sticker", features=[EncoderReuse()])
    images = draw(pipe, Request(prompt="red apple, 3d style", seed=1, count=2)).images

`generate` on the command line is options around these. The request and the plan of files import neither torch nor
diffusers, so that whatever can be refused is refused before a model is loaded.
"""
