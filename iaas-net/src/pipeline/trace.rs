//! How a stage says what it did. The data plane's tracer is empty and compiles to nothing.

use iaas_core::ObjectRef;
use iaas_core::spi::network::TraceStage;

/// Takes note of what each stage decided.
pub(crate) trait Tracer {
    /// A stage let the packet go on, or not.
    fn note(&mut self, stage: &'static str, passed: bool, why: impl FnOnce() -> (String, Option<ObjectRef>));
}

/// Notes nothing.
#[derive(Debug)]
pub(crate) struct Silent;

impl Tracer for Silent {
    #[inline]
    fn note(&mut self, _: &'static str, _: bool, _: impl FnOnce() -> (String, Option<ObjectRef>)) {}
}

/// Notes everything.
#[derive(Debug, Default)]
pub(crate) struct Recorder(pub(crate) Vec<TraceStage>);

impl Tracer for Recorder {
    fn note(&mut self, stage: &'static str, passed: bool, why: impl FnOnce() -> (String, Option<ObjectRef>)) {
        let (because, by) = why();
        self.0.push(TraceStage { stage: stage.to_owned(), passed, because, by });
    }
}
