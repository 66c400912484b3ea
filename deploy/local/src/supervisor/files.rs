//! What the user wrote, with what was applied over it.

use std::collections::{BTreeMap, BTreeSet};

use super::reconcile::Reconciler;
use crate::error::LocalError;
use crate::manifest::{self, Object};

impl Reconciler {
    /// Returns whether anything changed.
    pub(super) fn read_files(&mut self) -> Result<bool, LocalError> {
        let (files, problems) = manifest::read_directory(&self.config.manifests)?;
        let changed = problems != self.file_problems || files != self.sources || self.overlaid;
        if !changed {
            return Ok(false);
        }
        let resolved = self.overlay.resolve(&files);
        let same_hidden = resolved.hidden == self.hidden;
        let none = BTreeSet::new();
        let own = files.iter().map(|file| (file, &resolved.hidden));
        let applied = resolved.files.iter().map(|file| (file, &none));
        let mut next = BTreeMap::new();
        for (file, hidden) in own.chain(applied) {
            let parsed = match self.files.get(&file.relative) {
                Some((before, parsed)) if before == file && same_hidden => parsed.clone(),
                Some((_, before)) => manifest::parse_again(file, before, hidden),
                None => manifest::parse(file, hidden),
            };
            next.insert(file.relative.clone(), (file.clone(), parsed));
        }
        self.files = next;
        self.file_problems = problems;
        self.hidden = resolved.hidden;
        self.sources = files;
        self.overlaid = false;
        Ok(true)
    }

    pub(super) fn objects(&self) -> Vec<Object> {
        let parsed = self.files.values().map(|(_, parsed)| parsed);
        parsed.flat_map(|p| p.objects.iter().cloned()).collect()
    }
}
