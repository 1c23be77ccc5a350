//! Requests on their way, and the answers to them.

use crate::frame::MethodId;
use crate::method::Answer;

/// Stands for a request whose answer is awaited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ticket(u64);

#[derive(Debug)]
struct Request {
    ticket: Ticket,
    channel: u16,
    id: MethodId,
    /// Whether the broker answers when it has accepted the request; otherwise only a later answer shows that.
    is_answered: bool,
    /// The operation, as in messages.
    operation: String,
}

/// The requests of a connection. The broker acts on those of a channel in their order.
#[derive(Debug, Default)]
pub(crate) struct Requests {
    last: u64,
    pending: Vec<Request>,
    /// Answers with more to them than that the request is done, until they are taken.
    answers: Vec<(Ticket, Answer)>,
}

impl Requests {
    /// Adds a request that is sent.
    pub fn add(
        &mut self,
        channel: u16,
        id: MethodId,
        is_answered: bool,
        operation: String,
    ) -> Ticket {
        self.last += 1;
        let ticket = Ticket(self.last);
        self.pending.push(Request { ticket, channel, id, is_answered, operation });
        ticket
    }

    /// Records the answer to the first request of this kind on the channel: all before it are accepted. An answer to
    /// no request has no effect.
    pub fn answer(&mut self, channel: u16, id: MethodId, answer: Answer) {
        let is_meant = |request: &Request| {
            request.is_answered && (request.channel, request.id) == (channel, id)
        };
        let Some(ticket) = self.pending.iter().find(|r| is_meant(r)).map(|r| r.ticket) else {
            return;
        };
        self.pending.retain(|request| request.channel != channel || request.ticket.0 > ticket.0);
        if !matches!(answer, Answer::Done) {
            self.answers.push((ticket, answer));
        }
    }

    /// Records that the broker has closed the channel of these requests.
    pub fn refuse(&mut self, channel: u16) {
        for request in self.pending.extract_if(.., |request| request.channel == channel) {
            self.answers.push((request.ticket, Answer::Refused));
        }
    }

    /// Whether the answer is still awaited.
    pub fn is_pending(&self, ticket: Ticket) -> bool {
        self.pending.iter().any(|request| request.ticket == ticket)
    }

    /// The answer; `None` while it is awaited.
    pub fn take(&mut self, ticket: Ticket) -> Option<Answer> {
        if self.is_pending(ticket) {
            return None;
        }
        let index = self.answers.iter().position(|(answered, _)| *answered == ticket);
        Some(index.map_or(Answer::Done, |index| self.answers.swap_remove(index).1))
    }

    /// The operation of the first request of this kind that is not known to be accepted.
    pub fn operation(&self, id: MethodId) -> Option<&str> {
        let request = self.pending.iter().find(|request| request.id == id);
        request.map(|request| request.operation.as_str())
    }

    /// Whether requests of this kind on this channel are not known to be accepted.
    pub fn are_awaited(&self, channel: u16, id: MethodId) -> bool {
        self.pending.iter().any(|request| (request.channel, request.id) == (channel, id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::declare::QueueState;
    use crate::method::{CHANNEL_OPEN, OPEN};

    const DECLARE: MethodId = [0, 50, 0, 10];
    const BIND: MethodId = [0, 50, 0, 20];

    fn declared(consumers: u32) -> Answer {
        Answer::Declared(QueueState { name: "q".into(), messages: 0, consumers })
    }

    #[test]
    fn an_answer_accepts_all_requests_before_it_on_its_channel() {
        let mut requests = Requests::default();
        let open = requests.add(0, OPEN, true, "log in".into());
        requests.add(1, BIND, false, "bind".into());
        let first = requests.add(1, DECLARE, true, "declare 1".into());
        let second = requests.add(1, DECLARE, true, "declare 2".into());
        requests.answer(1, DECLARE, declared(1));
        assert!(!requests.is_pending(first));
        assert!(requests.is_pending(second) && requests.is_pending(open));
        assert_eq!(requests.operation(BIND), None);
        assert_eq!(requests.operation(DECLARE), Some("declare 2"));
        assert!(matches!(requests.take(first), Some(Answer::Declared(_))));
        assert!(requests.take(second).is_none());
        requests.answer(0, OPEN, Answer::Done);
        assert!(matches!(requests.take(open), Some(Answer::Done)));
    }

    #[test]
    fn an_answer_to_no_request_has_no_effect() {
        let mut requests = Requests::default();
        requests.answer(1, DECLARE, declared(1));
        let declare = requests.add(1, DECLARE, true, "declare".into());
        requests.answer(2, DECLARE, declared(1));
        requests.answer(1, CHANNEL_OPEN, Answer::Done);
        assert!(requests.is_pending(declare) && requests.are_awaited(1, DECLARE));
        assert!(requests.answers.is_empty());
    }

    #[test]
    fn a_closed_channel_refuses_its_requests_only() {
        let mut requests = Requests::default();
        let (one, two) = (
            requests.add(1, DECLARE, true, "one".into()),
            requests.add(2, DECLARE, true, "two".into()),
        );
        requests.refuse(2);
        assert!(requests.is_pending(one));
        assert!(matches!(requests.take(two), Some(Answer::Refused)));
    }
}
