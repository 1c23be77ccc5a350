//! An outbox in memory. The input waits for the broker.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use amqp::Error as AmqpError;
use anyhow::Error;

use crate::counts::Counts;
use crate::message::Message;
use crate::outbox::{BrokerState, Outbox, first_numbers};
use crate::session::SessionConfig;
use crate::window::Window;

/// Messages in memory. A message that the broker does not accept ends the publisher.
pub struct MemoryOutbox {
    config: Arc<SessionConfig>,
    window: Window,
    /// Messages that wait for room in the window.
    unsent: VecDeque<Message>,
    /// The error of a message that the broker does not accept. The publisher ends with it when all messages in the
    /// window are confirmed.
    rejected: Option<Error>,
    /// Whether messages after a rejected one were removed and are not sent.
    has_rejected: bool,
}

impl MemoryOutbox {
    /// An outbox without messages.
    pub fn new(config: &Arc<SessionConfig>) -> MemoryOutbox {
        let mut window = Window::new(Counts::new(config.confirms));
        if config.resends_unroutable {
            window.resend_unroutable();
        }
        let (config, unsent) = (Arc::clone(config), VecDeque::new());
        MemoryOutbox { config, window, unsent, rejected: None, has_rejected: false }
    }
}

impl Outbox for MemoryOutbox {
    fn window(&self) -> &Window {
        &self.window
    }

    fn window_mut(&mut self) -> &mut Window {
        &mut self.window
    }

    fn put(&mut self, message: Message) -> Result<(), Error> {
        self.unsent.push_back(message);
        Ok(())
    }

    fn accepts_input(&self, broker: BrokerState) -> bool {
        broker >= BrokerState::Blocked && self.unsent.is_empty() && self.rejected.is_none()
    }

    fn next(&mut self, broker: BrokerState) -> Result<Option<Message>, Error> {
        if broker < BrokerState::Blocked || self.rejected.is_some() {
            return Ok(None);
        }
        let limit = self.window.max_body;
        if self.unsent.front().is_some_and(|first| first.body.len() > limit)
            && let Some(first) = self.unsent.pop_front()
        {
            let pieces = first.split(limit).into_iter().rev();
            pieces.for_each(|piece| self.unsent.push_front(piece));
        }
        let has_room = |first: &Message| self.window.has_room_again_for(first);
        if !self.unsent.front().is_some_and(has_room) {
            return Ok(None);
        }
        let next = self.unsent.pop_front();
        next.iter().for_each(|message| self.window.push(message.clone()));
        Ok(next)
    }

    fn work(&mut self, _: BrokerState) -> Result<(), Error> {
        match self.rejected.take_if(|_| self.window.is_empty()) {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    fn first_unconfirmed(&self) -> Option<BTreeMap<u64, u64>> {
        let messages = self.window.unconfirmed().chain(&self.unsent);
        (!self.has_rejected).then(|| first_numbers(messages))
    }

    fn limit_bodies(&mut self, limit: usize, cause: &AmqpError) {
        if let Some(message) = self.window.split_to_limit(limit) {
            let error = self.config.at_record(&message, cause.kind(), &cause.to_string());
            (self.rejected, self.has_rejected) = (Some(error.into()), true);
        }
    }

    fn is_empty(&self) -> bool {
        self.window.is_empty() && self.unsent.is_empty() && self.rejected.is_none()
    }
}
