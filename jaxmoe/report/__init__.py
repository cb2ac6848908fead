"""One self-contained page about a run: `python -m jaxmoe.report RUN` writes RUN/report.html."""
