//! The access log: one line for each request, in Envoy's format language, by default exactly
//! Istio's line, so that existing log pipelines read it.
//!
//! A format is compiled once into segments; a line is written into one buffer per thread.

mod format;
mod operator;

pub use format::{DEFAULT_JSON, DEFAULT_TEXT, Format, FormatError};

use std::cell::RefCell;

use adit_shared::telemetry::LogWriter;

use super::event::RequestEvent;

/// Renders `event` and queues the line.
pub fn write(log: &LogWriter, format: &Format, event: &RequestEvent<'_>) {
    thread_local! {
        static LINE: RefCell<String> = const { RefCell::new(String::new()) };
    }
    LINE.with_borrow_mut(|line| {
        line.clear();
        format.render(event, line);
        if !line.ends_with('\n') {
            line.push('\n');
        }
        log.write_line(line.as_bytes());
        // One request with a huge header leaves no lasting mark on the memory.
        line.shrink_to(16 << 10);
    });
}

#[cfg(test)]
mod tests;
