//! A run as one HTML file: no outside reference, no script; inline style and SVG.
//!
//! Every number that is drawn stands on its mark (`data-` attributes), with the scale that placed it on the plot
//! (`data-x`, `data-y`: domain, then range), so that a reader can take it back from the picture.

mod bars;
mod budgets;
mod chosen;
mod curves;
mod depths;
mod entropy;
mod ladder;
mod latency;
mod markup;
mod memory;
mod plot;
mod sheet;
mod similarity;
mod summary;
mod tree;
mod words;

pub use budgets::{BudgetClaim, BudgetLine, BudgetPlot, BudgetPoint, render_budgets};
pub use curves::{Curve, Panel, render_curves};
pub use depths::{DepthPanel, DepthPlot, DepthPoint, DepthSeries, DepthStyle, render_depths};
use markup::El;
use plot::Figure;

use super::ladder::LadderReport;
use super::{ProblemResult, SolveReport};

/// What a report shows. Everything may be missing but the title.
#[derive(Clone, Debug, Default)]
pub struct ReportData<'a> {
    /// The page's title.
    pub title: String,
    /// Name and value of what the configuration does not say: model, device, compute type.
    pub setting: Vec<(String, String)>,
    /// The run in sum.
    pub report: Option<&'a SolveReport>,
    /// What was solved.
    pub problems: &'a [ProblemResult],
    /// Policies against each other.
    pub ladder: Option<&'a LadderReport>,
    /// What ended the run before its end.
    pub error: Option<String>,
}

/// A part of the page.
struct Section {
    id: &'static str,
    title: &'static str,
    lead: String,
    figures: Vec<Figure>,
    tables: Vec<El>,
    is_absent: bool,
}

impl Section {
    fn new(id: &'static str, title: &'static str) -> Self {
        Self { id, title, lead: String::new(), figures: Vec::new(), tables: Vec::new(), is_absent: false }
    }

    /// There is nothing to draw, and this is why.
    fn absent(mut self, why: &str) -> Self {
        self.lead = why.into();
        self.is_absent = true;
        self
    }

    fn into_el(self) -> El {
        let mut section = El::new("section").attr("id", self.id);
        if self.is_absent {
            section = section.class("absent");
        }
        section = section.child(El::new("h2").text(self.title));
        if !self.lead.is_empty() {
            section = section.child(El::new("p").text(&self.lead));
        }
        if !self.figures.is_empty() {
            let figures = self.figures.into_iter().map(Figure::into_el);
            section = section.child(El::new("div").class("figures").children(figures));
        }
        section.children(self.tables)
    }
}

/// The whole page.
pub fn render(data: &ReportData<'_>) -> String {
    let head = El::new("head")
        .child(El::new("meta").attr("charset", "utf-8"))
        .child(meta("viewport", "width=device-width, initial-scale=1"))
        .child(meta("color-scheme", "light dark"))
        .child(El::new("title").text(&data.title))
        .child(El::new("style").verbatim(include_str!("html/page.css")));
    let sections = [
        ladder::section(data),
        latency::section(data),
        entropy::section(data),
        similarity::section(data),
        tree::section(data),
        memory::section(data),
    ];
    // What there is comes first; what there is not is said in a line each at the end.
    let (absent, present): (Vec<Section>, Vec<Section>) = sections.into_iter().partition(|s| s.is_absent);
    let main = El::new("main")
        .child(header(data))
        .children(present.into_iter().map(Section::into_el))
        .children(all_problems(data))
        .children(absent.into_iter().map(Section::into_el));
    let html = El::new("html").attr("lang", "en").child(head).child(El::new("body").child(main));
    // HTML has no end tag for `meta`; everything else of the page is XML as it stands.
    format!("<!DOCTYPE html>\n{html}\n").replace("></meta>", "/>")
}

fn meta(name: &str, content: &str) -> El {
    El::new("meta").attr("name", name).attr("content", content)
}

fn header(data: &ReportData<'_>) -> El {
    let mut header = El::new("header").child(El::new("h1").text(&data.title));
    if let Some(error) = &data.error {
        let words = "The run ended with an error; what follows is what was done until then. ";
        let error = El::new("p").class("error").attr("role", "alert").text(words).child(El::new("b").text(error));
        header = header.child(error);
    }
    if !data.setting.is_empty() {
        let setting: Vec<String> = data.setting.iter().map(|(name, value)| format!("{name}: {value}")).collect();
        header = header.child(El::new("p").class("setting").text(&setting.join(" | ")));
    }
    if let Some(report) = data.report {
        let words = El::new("div")
            .child(El::new("p").text(&words::configuration(&report.config).join(" ")))
            .child(summary::configuration(report));
        let numbers = El::new("div").child(summary::summary(report, data.problems));
        header = header.child(El::new("div").class("overview").child(numbers).child(words));
    }
    header
}

fn all_problems(data: &ReportData<'_>) -> Option<El> {
    let table = summary::problems(data)?;
    Some(El::new("section").attr("id", "problems").child(El::new("h2").text("Every problem")).child(table))
}
