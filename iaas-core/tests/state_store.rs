//! Both stores against the contract; the durable one on real files, also under a kill.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use iaas_core::testing::conformance::state_store;
use iaas_core::testing::conformance::state_store::MemoryRig;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_memory_store_keeps_the_contract() {
    state_store::run(&MemoryRig::default()).await.assert_clean();
}

#[cfg(feature = "redb")]
mod durable {
    use std::io::BufRead;
    use std::io::BufReader;
    use std::path::PathBuf;
    use std::process::Command;
    use std::process::Stdio;
    use std::sync::Arc;
    use std::sync::Mutex;
    use std::time::Duration;

    use async_trait::async_trait;
    use iaas_core::Epoch;
    use iaas_core::Result;
    use iaas_core::Rev;
    use iaas_core::spi::state_store::StateStore;
    use iaas_core::spi::state_store::Write;
    use iaas_core::store::RedbStore;
    use iaas_core::testing::conformance::state_store;
    use tempfile::TempDir;
    use uuid::Uuid;

    #[derive(Default)]
    struct FileRig {
        folder: Mutex<Option<TempDir>>,
    }

    impl FileRig {
        fn path(&self) -> PathBuf {
            self.folder.lock().unwrap().as_ref().unwrap().path().join("state.iaas")
        }
    }

    #[async_trait]
    impl state_store::Rig for FileRig {
        async fn fresh(&self) -> Result<Arc<dyn StateStore>> {
            *self.folder.lock().unwrap() = Some(tempfile::tempdir().unwrap());
            Ok(Arc::new(RedbStore::open(self.path())?))
        }

        async fn reopen(&self, old: Arc<dyn StateStore>) -> Result<Arc<dyn StateStore>> {
            drop(old);
            Ok(Arc::new(RedbStore::open(self.path())?))
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn the_durable_store_keeps_the_contract() {
        state_store::run(&FileRig::default()).await.assert_clean();
    }

    /// Not a test of its own: the process that the next test kills. Prints each revision that was acknowledged.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn victim() {
        let Some(path) = std::env::var_os(PLACE) else { return };
        let store = RedbStore::open(path).unwrap();
        let lead = store.lead(Uuid::from_u128(1), Duration::from_secs(60), Epoch(0)).await.unwrap().unwrap();
        for n in 0_u64.. {
            let write = Write::Put(n.to_be_bytes().to_vec().into(), vec![1; 300].into());
            let rev = store.commit(&lead, vec![], vec![write]).await.unwrap();
            println!("acknowledged {rev}");
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn what_was_acknowledged_is_there_after_a_kill() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.iaas");
        let mut acknowledged = 0;
        for acks in [1, 7, 40] {
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "durable::victim", "--nocapture"])
                .env(PLACE, &path)
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let lines = BufReader::new(child.stdout.take().unwrap()).lines();
            let revs = lines.map_while(|line| line.ok()).filter_map(|line| {
                line.split_once("acknowledged ").and_then(|(_, rev)| rev.trim().parse::<u64>().ok())
            });
            let last = revs.take(acks).last().unwrap();
            child.kill().unwrap();
            child.wait().unwrap();
            assert!(last > acknowledged);
            acknowledged = last;

            let store = RedbStore::open(&path).unwrap();
            let (found, rev) = store.scan(b"", None, usize::MAX).await.unwrap();
            assert!(rev >= Rev(acknowledged), "{rev} is below the acknowledged {acknowledged}");
            // Each run writes the keys 0, 1, 2 …: the last one's revisions are all there, one after the other.
            assert!(found.len() >= acks);
            let ours = found.iter().take(acks).map(|entry| entry.rev);
            assert!(ours.is_sorted(), "{found:?}");
            assert_eq!(found[acks - 1].rev, Rev(acknowledged));
        }
    }

    const PLACE: &str = "IAAS_TEST_STATE_STORE";
}
