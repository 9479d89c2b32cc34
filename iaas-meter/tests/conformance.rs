//! The reference meter keeps the contract of meters.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;

use async_trait::async_trait;
use iaas_core::Error;
use iaas_core::Result;
use iaas_core::spi::meter::MeterSink;
use iaas_core::testing::conformance::meter;
use iaas_core::testing::conformance::meter::Rig;
use iaas_core::testing::conformance::wire::WiredMeter;
use iaas_meter::Meter;
use tempfile::TempDir;

/// Each fresh meter in a new folder below one; a restart opens the newest again.
#[derive(Debug)]
struct Reference {
    parent: TempDir,
    made: Mutex<u32>,
}

impl Reference {
    fn new() -> Self {
        Self { parent: tempfile::tempdir().expect("a temporary folder"), made: Mutex::new(0) }
    }

    fn newest(&self, more: u32) -> PathBuf {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        *made += more;
        self.parent.path().join(format!("meter-{made}"))
    }
}

#[async_trait]
impl Rig for Reference {
    async fn fresh(&self) -> Result<Arc<dyn MeterSink>> {
        Ok(Arc::new(Meter::open(self.newest(1))?))
    }

    async fn reopen(&self, old: Arc<dyn MeterSink>) -> Result<Arc<dyn MeterSink>> {
        // Only the last handle unlocks the folder.
        if Arc::strong_count(&old) != 1 {
            return Err(Error::conflict("the old meter is still held"));
        }
        drop(old);
        Ok(Arc::new(Meter::open(self.newest(0))?))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_reference_meter_keeps_its_contract() {
    meter::run(&Reference::new()).await.assert_clean();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_reference_meter_keeps_its_contract_over_a_wire() {
    meter::run(&WiredMeter::new(Reference::new())).await.assert_clean();
}
