"""One page that shows what a conversion did to a network: the verdict, and which layer hurts."""

from logshift.converter.page.content import Page, gather
from logshift.converter.page.write import check_target, render, write_page

__all__ = ["Page", "check_target", "gather", "render", "write_page"]
