"""``primeflow leaderboard``: tables, statistics, figures and one page of any number of finished runs."""

import argparse

from primeflow_perturbench.cli.common import Parser, answering, at_least, make_console


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(
        prog="primeflow leaderboard",
        description="Collect finished runs of one data set and split into tables (CSV, Markdown, LaTeX), statistics, "
        "figures and one page, report.html. An interrupted command continues where it stopped.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="folders of runs, or folders that contain runs")
    parser.add_argument("--output", default="leaderboard", help="output folder (default: %(default)s)")
    parser.add_argument("--title", default="PRiMeFlow leaderboard", help="title of the page (default: %(default)s)")
    parser.add_argument("--baseline", metavar="LABEL", help="row to compare with (default: the best mean rank)")
    parser.add_argument(
        "--published",
        action="append",
        default=[],
        metavar="NAME",
        help="show the published figures of a data set, norman19 or sciplex3 (default: by the name of the data file)",
    )
    parser.add_argument(
        "--figures",
        type=at_least(0),
        default=3,
        metavar="N",
        help="draw the cells of N conditions, from the best to the worst (default: %(default)s)",
    )
    parser.add_argument("--no-figures", action="store_true", help="draw no figure at all")
    parser.add_argument("--conditions", nargs="+", default=[], metavar="LABEL", help="conditions to draw instead")
    parser.add_argument(
        "--models", nargs="+", default=[], metavar="LABEL", help="rows whose cells are drawn (default: the first)"
    )
    return parser.parse_args()


def main() -> None:
    """Run the command."""
    arguments = parse()
    console = make_console()

    def work() -> None:
        from primeflow_perturbench.leaderboard.page import ReportOptions, make_report

        options = ReportOptions(
            title=arguments.title,
            baseline=arguments.baseline,
            published=arguments.published,
            figures=0 if arguments.no_figures else arguments.figures,
            conditions=arguments.conditions,
            models=arguments.models,
        )
        page = make_report(arguments.runs, arguments.output, options, console)
        console.print(f"Tables and figures are beside the page, {page}")

    answering(work)
