//! Tables: upper-case headers, aligned columns.

use std::io::Write;

use tabwriter::TabWriter;

/// Spaces between columns.
const PADDING: usize = 3;

/// Rows below headers.
#[derive(Debug)]
pub struct Table {
    columns: usize,
    text: String,
}

impl Table {
    /// An empty table.
    pub fn new<const N: usize>(headers: [&str; N]) -> Self {
        let mut table = Self {
            columns: N,
            text: String::new(),
        };
        table.push(&headers);
        table
    }

    /// Adds a row, with as many cells as there are headers.
    pub fn row<const N: usize>(&mut self, cells: [&str; N]) {
        debug_assert_eq!(N, self.columns, "one cell a header");
        self.push(&cells);
    }

    fn push(&mut self, cells: &[&str]) {
        for (index, cell) in cells.iter().enumerate() {
            if index > 0 {
                self.text.push('\t');
            }
            self.text.push_str(&printable(cell));
        }
        self.text.push('\n');
    }

    /// The aligned text, a newline after every line.
    pub fn render(self) -> String {
        let mut writer = TabWriter::new(Vec::new()).minwidth(0).padding(PADDING);
        // A vector takes everything, and what comes out is what went in and spaces.
        let aligned = writer
            .write_all(self.text.as_bytes())
            .and_then(|()| writer.flush())
            .ok()
            .and_then(|()| writer.into_inner().ok())
            .and_then(|bytes| String::from_utf8(bytes).ok())
            .unwrap_or(self.text);
        let lines = aligned.lines().map(str::trim_end);
        lines.flat_map(|line| [line, "\n"]).collect()
    }
}

/// Names come from other programs: none of them moves the cursor or breaks the table.
pub fn printable(text: &str) -> String {
    let visible = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().map(visible).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_lines_end_with_text() {
        let mut table = Table::new(["NAME", "NODE", "WAYPOINT"]);
        table.row(["a", "node1", ""]);
        table.row(["a-long-name", "", "None"]);
        assert_eq!(
            table.render(),
            "NAME          NODE    WAYPOINT\n\
             a             node1\n\
             a-long-name           None\n"
        );
    }

    #[test]
    fn a_cell_cannot_break_out() {
        let mut table = Table::new(["A", "B"]);
        table.row(["x\ty\n\u{1b}[2J", "z"]);
        assert_eq!(table.render(), "A          B\nx y  [2J   z\n");
    }
}
