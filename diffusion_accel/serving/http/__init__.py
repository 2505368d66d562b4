"""HTTP around the engine: the API of OpenAI's images, jobs, and an adapter for clients of AUTOMATIC1111's web UI.

    from diffusion_accel.serving.http.run import serve

Needs the extra `serve`. Everything from outside is checked here, before the engine sees it.

- `run`, `app`: the server with its signals, and the application
- `guard`, `problems`, `log`: what every request passes: token, limits of its body, errors, log lines
- `settings`, `bodies`, `uploads`, `asked`, `plans`: what may be asked, and what it means to the engine
- `service`, `answers`, `events`, `metrics`: drawing it, and what goes back
- `page`: the page for browsers
- `images`, `jobs`, `loras`, `webui`, `operations`: the routes
"""
