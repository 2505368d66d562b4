"""The page of the server at `/`, for whoever has a browser; needs the extra `ui` (gradio).

    app.router.routes.append(PageRoute(service))

It asks the same reader and engine as the routes do, behind the same guard. Gradio is imported when somebody opens the
page for the first time. Of Gradio's own addresses those are answered that the page needs, no others: nothing is
uploaded, no address is fetched for anybody, and the only files that are served are the images that the page has made.

- `route`: what is answered, and what says how to install it
- `view`: the page; `style.css`, `drop.js`
- `painter`: drawing what was asked for, its progress and its end; `files` where the images lie meanwhile
- `fields`, `memory`, `choices`: what the fields hold, also read from a dropped image; the slider's plans
"""
