//! What you call: a cloud, a session of somebody, and the families of resources.

pub mod blobs;
pub mod builder;
pub mod change;
pub mod session;

use std::sync::Arc;
use std::time::Duration;

pub use blobs::FolderBlobs;
pub use blobs::MemoryBlobs;
pub use builder::CloudBuilder;
pub use change::Change;
pub use change::Op;
pub use session::NewInstance;
pub use session::Session;

use crate::Id;
use crate::Result;
use crate::engine::Engine;
use crate::id;
use crate::security::Gate;
use crate::spi::authorizer::Principal;

/// A cloud inside this process.
///
/// Cheap to clone; all clones are one cloud. It uses the tokio runtime in which it was opened and starts none. Dropping the
/// last clone stops the control plane; instances go on running and are found again by the next [`CloudBuilder::open`].
#[derive(Clone, Debug)]
pub struct Cloud {
    engine: Arc<Engine>,
}

impl Cloud {
    /// Begins to compose a cloud.
    pub fn builder() -> CloudBuilder {
        CloudBuilder::default()
    }

    pub(crate) fn new(engine: Engine) -> Self {
        Self { engine: Arc::new(engine) }
    }

    /// Acts as `principal`, for whom the calling program vouches.
    pub fn session(&self, principal: Principal) -> Session {
        Session::new(self.clone(), Arc::new(principal))
    }

    /// Acts as the principal of that name, in no group.
    pub fn session_as(&self, name: &str) -> Session {
        self.session(Principal { name: name.to_owned(), groups: Vec::new(), on_behalf_of: None })
    }

    /// Which cloud this is.
    pub fn id(&self) -> Id<id::Cloud> {
        self.engine.cloud().id
    }

    /// Waits until every record is as it wants to be, or `within` of the cloud's clock has passed; says which.
    pub async fn settled(&self, within: Duration) -> bool {
        let mut rest = self.engine.driver().rest.subscribe();
        let committer = self.engine.committer();
        let clock = committer.clock();
        // What was woken before this call must have been looked at.
        let woken = committer.woken();
        tokio::select! {
            settled = rest.wait_for(|rest| rest.idle && rest.taken >= woken) => settled.is_ok(),
            () = clock.sleep(within) => false,
        }
    }

    /// How many orphans sweeps have removed: each is a defect of this SDK.
    pub fn orphans_removed(&self) -> u64 {
        self.engine.driver().sweeper.removed()
    }

    /// What lies on the sites under this cloud's tag, holds data, and is in no record: for the operator to adopt or to delete.
    pub fn quarantine(&self) -> std::collections::BTreeSet<crate::ObjectRef> {
        self.engine.driver().sweeper.quarantine()
    }

    /// Gives the lead back and stops the control plane; instances go on running.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn close(self) -> Result<()> {
        let committer = Arc::clone(self.engine.committer());
        let closed = crate::Error::unavailable("the cloud was closed").remedy("open it again");
        committer.stop(closed.outcome_is(crate::Outcome::NotDone));
        committer.store().resign(committer.lead().clone()).await
    }

    pub(crate) fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    pub(crate) fn gate(&self) -> &Gate {
        self.engine.gate()
    }
}
