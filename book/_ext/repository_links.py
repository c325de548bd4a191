"""Edit, issue and launch links of whichever repository builds the book; none in a local build."""

import os


def links(environ) -> dict:
    """Theme options that link to the repository named in `environ`."""
    name = environ.get("BOOK_REPOSITORY") or environ.get("GITHUB_REPOSITORY")
    if not name:
        return {"launch_buttons": {}}
    server = environ.get("GITHUB_SERVER_URL") or "https://github.com"
    # On a pull request the ref is a merge number, which no link can open; the head is a branch.
    branch = environ.get("GITHUB_HEAD_REF") or environ.get("GITHUB_REF_NAME") or "main"
    return {
        "repository_url": f"{server.rstrip('/')}/{name}",
        "repository_provider": "github",
        "repository_branch": branch,
        "path_to_docs": "",  # page names already begin with book/
        "use_repository_button": True,
        "use_edit_page_button": True,
        "use_issues_button": True,
        "launch_buttons": {
            "notebook_interface": "jupyterlab",
            "binderhub_url": "https://mybinder.org",
        },
    }


def _set_links(app, config):
    config.html_theme_options.pop("repository_url", None)  # Jupyter Book's own address by default
    config.html_theme_options.update(links(os.environ))


def setup(app):
    """Fill the theme's options before the theme reads them."""
    app.connect("config-inited", _set_links)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
